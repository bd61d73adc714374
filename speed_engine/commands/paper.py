"""`paper`: what the papers report, row by row, and the commands that run a row."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("row", nargs="?", help="a row's name; without it: all rows")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import paper

    print(paper.listed() if args.row is None else paper.shown(args.row))
    return 0
