"""`plot`: the pictures of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from speed_engine.commands import run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: RUN/plots")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import plots, plots_table
    from speed_engine.reports.run_folder import open_run

    run = open_run(args.run, args.trust)
    out = args.out or args.run / "plots"
    for path in [*plots.plot_run(args.run, out), *plots_table.plot_table(run.table(), out)]:
        print(path)
    return 0
