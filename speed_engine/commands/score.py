"""`score`: how good a folder of samples is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=Path, required=True, help="a folder that `sample` wrote")
    parser.add_argument("--reference", required=True, help="`digits`, or a folder of images")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import scores

    print(json.dumps(scores.score(args.samples, args.reference), indent=1))
    return 0
