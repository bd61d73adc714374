"""`table`: the step table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speed_engine.commands import config_arguments, configured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, default="imagenet256_dit_xl2")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="one JSON object, with all rows")
    shape.add_argument("--csv", action="store_true", help="all rows as CSV")
    parser.add_argument(
        "--compare", metavar="KIND,KIND,...", help="where each method's loss falls, by log-SNR"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="also draw (a folder without --compare)"
    )


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import plots_table, table, table_compare
    from speed_engine.training.assembly import build_table

    config = configured(args)
    form = "json" if args.json else "csv" if args.csv else "text"
    if args.compare is None:
        one = build_table(config)
        print(table.report(one, form))
        drawn = plots_table.plot_table(one, args.plot) if args.plot else []
    else:
        kinds = args.compare.split(",")
        many = table_compare.tables(config.schedule, config.objective, kinds)
        print(table_compare.compare(many, form))
        drawn = [plots_table.plot_comparison(many, args.plot)] if args.plot else []
    for path in drawn:
        print(path, file=sys.stderr)
    return 0
