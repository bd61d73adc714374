"""`export`: weights as safetensors, or as a diffusers folder with a model card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from speed_engine.commands import refuse_folder, run_arguments
from speed_engine.progress import wrapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the file or folder to write")
    parser.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument(
        "--vae",
        help="diffusers: folder or hub name of the AutoencoderKL, of which a copy is put in",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="diffusers: a report of `score` on samples of these weights, for the model card",
    )


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports.run_folder import open_run

    if args.format == "safetensors":
        refuse_folder(args.out)
        for name in ("vae", "scores"):
            if getattr(args, name):
                raise ValueError(f"--{name} is for --format diffusers; leave it out")
    opened = open_run(args.run, args.trust)
    model: Any = opened.model(args.weights)
    if args.format == "diffusers":
        for sentence in _diffusers(args, opened, model):
            print(wrapped(f"note: {sentence}"))
    else:
        from speed_engine.weights import file as weights_file

        config = opened.config.model_dump(mode="json")
        notes = {"step": opened.step, "weights": args.weights, "run": config}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        weights_file.save(args.out, model, notes=notes)
    print(args.out)
    return 0


def _diffusers(args: argparse.Namespace, opened: Any, model: Any) -> list[str]:
    from speed_engine.reports import published
    from speed_engine.sampling.process import Process
    from speed_engine.weights.diffusers_pipeline import export_pipeline

    config = opened.config
    process = Process.of(
        opened.table().schedule,
        config.objective,
        config.learned_variance,
        opened.facts.shape,
        opened.conditions,
    )
    told = published.of_run(opened, args.weights, args.scores)
    return export_pipeline(args.out, model, process, told, args.vae)
