"""`compare`: a study, methods x seeds x settings from one file, run and reported with intervals."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", nargs="?", help="a shipped study's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the study's own")
    parser.add_argument("--out", type=Path, help="folder of the study; default: runs/studies/NAME")
    parser.add_argument(
        "--jobs", type=int, help="cells at a time; default: one a GPU, or one a CPU core"
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and seeds: minutes")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="only make a report again from its JSON"
    )


def run(args: argparse.Namespace) -> int:
    from speed_engine.studies import report, runs, study

    if args.report:
        if args.study or args.out or args.quick:
            raise ValueError("--report takes everything from its folder; leave out the rest")
        out, stored = report.read(args.report)
    else:
        if args.study is None:
            raise ValueError(f"name a study: {', '.join(study.studies())}, or a YAML file")
        if args.jobs is not None and args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs} must be at least 1")
        chosen = study.load(args.study, args.overrides, args.quick)
        cells = study.cells(chosen)
        folder = args.out or Path("runs/studies") / chosen.name
        held = runs.claim(folder, chosen)
        runs.interruptible()
        runs.train(chosen, cells, folder, args.jobs)
        stored, out = report.gather(chosen, cells, folder), folder / "report"
        held.close()
    for path in report.write(stored, out):
        print(path)
    return 0
