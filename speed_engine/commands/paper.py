"""`paper`: what the papers report, row by row, and the commands that run a row."""

from __future__ import annotations

import argparse

from speed_engine.progress import wrapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("row", nargs="?", help="a row's name; without it: all rows")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import paper

    print(
        wrapped(paper.listed(), " " * 29)
        if args.row is None
        else wrapped(paper.shown(args.row), " " * 11)
    )
    return 0
