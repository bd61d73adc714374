"""`doctor`: what is here, which kernel will run, and why."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import doctor

    return doctor.run(args.json)
