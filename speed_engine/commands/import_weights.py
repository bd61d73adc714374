"""`import`: a public DiT checkpoint or diffusers folder as our safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from speed_engine.commands import refuse_folder
from speed_engine.progress import wrapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", type=Path, required=True, help="a public .pt, or a diffusers folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    foreign_arguments(parser)


def foreign_arguments(parser: argparse.ArgumentParser) -> None:
    """What files of others leave open."""
    parser.add_argument(
        "--frequency-shift",
        type=int,
        choices=(0, 1),
        help="of a diffusers folder: 0 if it was converted from public weights (default: as diffusers computes)",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        help="classes of a foreign label table; default: its rows but one, and the last row is the null label",
    )
    parser.add_argument(
        "--num-heads", type=int, help="of a .pt whose size is none of the published ones"
    )


def run(args: argparse.Namespace) -> int:
    from speed_engine.weights import file as weights_file
    from speed_engine.weights import source

    if not args.source.exists():
        raise ValueError(f"there is no file or folder {args.source}; check --source")
    refuse_folder(args.out)
    found = source.read(
        args.source,
        num_classes=args.num_classes,
        num_heads=args.num_heads,
        frequency_shift=args.frequency_shift,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights_file.save(args.out, found.model, notes={"source": args.source.name})
    for sentence in found.remarks:
        print(wrapped(f"note: {sentence}"))
    print(args.out)
    return 0
