"""`paper`: what the papers report, row by row, and the commands that run a row."""

from __future__ import annotations

import argparse

from speed_engine.progress import wrapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("row", nargs="?", help="a row's name; without it: all rows")
    parser.add_argument("--markdown", action="store_true", help="all of them as a page")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import paper

    if args.markdown and args.row:
        raise ValueError("--markdown writes the page of all rows; leave out the row")
    if args.markdown:
        print(paper.as_markdown())
    elif args.row:
        print(wrapped(paper.shown(args.row), " " * 11))
    else:
        print(wrapped(paper.listed(), " " * 29))
    return 0
