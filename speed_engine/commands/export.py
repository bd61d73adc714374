"""`export`: weights as safetensors or as a diffusers folder."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from speed_engine.commands import refuse_folder, run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the file or folder to write")
    parser.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports.run_folder import open_run
    from speed_engine.weights import file as weights_file

    if args.format == "safetensors":
        refuse_folder(args.out)
    run = open_run(args.run, args.trust)
    model: Any = run.model(args.weights)
    if args.format == "diffusers":
        from speed_engine.weights.diffusers_folder import adapter_of_model

        with warnings.catch_warnings(action="ignore"):  # the same cautions, told here once
            cautions = adapter_of_model(model).export_diffusers(args.out, model)
        for caution in cautions:
            print(f"note: {caution}")
    else:
        config = run.config.model_dump(mode="json")
        notes = {"step": run.step, "weights": args.weights, "run": config}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        weights_file.save(args.out, model, notes=notes)
    print(args.out)
    return 0
