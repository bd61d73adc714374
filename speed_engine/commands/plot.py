"""`plot`: the pictures of a run, or of several in one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from speed_engine.commands import run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser, many=True)
    parser.add_argument("--out", type=Path, help="default: RUN/plots; needed for several runs")
    parser.add_argument(
        "--format",
        action="append",
        choices=("png", "pdf", "svg"),
        help="may be repeated (default: png); pdf for papers",
    )


def run(args: argparse.Namespace) -> int:
    if len(args.run) > 1 and args.out is None:
        raise ValueError("several runs are drawn into a folder of their own; give --out")
    out = args.out or args.run[0] / "plots"
    for ending in dict.fromkeys(args.format or ["png"]):
        for path in _several(args, out, ending) if len(args.run) > 1 else _one(args, out, ending):
            print(path)
    return 0


def _one(args: argparse.Namespace, out: Path, ending: str) -> Iterator[Path]:
    from speed_engine.reports import plots, plots_classes, plots_table
    from speed_engine.reports.run_folder import open_run

    folder = args.run[0]
    run = open_run(folder, args.trust)
    yield from plots.plot_run(folder, out, ending)
    yield from plots_table.plot_table(run.table(), out, ending)
    if (learned := run.learned_table()) is not None:
        both = {"at the start": run.table(), f"at step {run.step:,}": learned}
        yield plots_table.plot_comparison(both, out / f"timesteps_learned.{ending}")
    if found := plots_classes.agreement_of(folder / "samples" / "score.json"):
        label = run.facts.conditions.get("label")
        names, path = label.names if label else (), out / f"classes.{ending}"
        yield plots_classes.plot_agreement(found, names, plots.describe(folder), path)


def _several(args: argparse.Namespace, out: Path, ending: str) -> Iterator[Path]:
    from speed_engine.reports import plots_runs, plots_table
    from speed_engine.reports.run_folder import open_run

    labels = plots_runs.labels_of(args.run)
    runs = [open_run(folder, args.trust) for folder in args.run]
    yield from plots_runs.plot_runs(args.run, out, ending)
    tables = {}
    for label, run in zip(labels, runs, strict=True):
        learned = run.learned_table()
        name = label if learned is None else f"{label}, step {run.step:,}"
        tables[name] = learned or run.table()
    yield plots_table.plot_comparison(tables, out / f"timesteps.{ending}")
