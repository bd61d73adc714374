"""`summary`: one page on a run."""

from __future__ import annotations

import argparse

from speed_engine.commands import run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("--started", type=float, help="time.time() of the first command")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import summary

    return summary.run(args.run, args.started, args.trust)
