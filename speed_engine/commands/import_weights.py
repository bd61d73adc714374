"""`import`: a public DiT checkpoint or diffusers folder as our safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", type=Path, required=True, help="a public .pt, or a diffusers folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument(
        "--frequency-shift",
        type=int,
        choices=(0, 1),
        help="of a diffusers folder: 0 if it was converted from public weights (default: as diffusers computes)",
    )
    parser.add_argument(
        "--num-classes",
        type=int,
        help="classes of the label table; default: its rows but one, and the last row is the null label",
    )
    parser.add_argument(
        "--num-heads", type=int, help="of a .pt whose size is none of the published ones"
    )


def run(args: argparse.Namespace) -> int:
    from speed_engine.weights import dit_diffusers, dit_public
    from speed_engine.weights import file as weights_file

    if not args.source.exists():
        raise ValueError(f"there is no file or folder {args.source}; check --source")
    if args.source.is_dir():
        if args.num_heads is not None:
            raise ValueError("a diffusers folder says its number of heads; leave out --num-heads")
        model = dit_diffusers.import_diffusers(
            args.source, args.frequency_shift, num_classes=args.num_classes
        )
    else:
        if args.frequency_shift is not None:
            raise ValueError(
                "--frequency-shift is for diffusers folders; a .pt has the public one, 0"
            )
        model = dit_public.import_pt(
            args.source, num_classes=args.num_classes, num_heads=args.num_heads
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights_file.save(args.out, model, notes={"source": args.source.name})
    if not (args.source / dit_diffusers.SIDECAR).exists():  # our own folder leaves nothing open
        for sentence in dit_public.assumptions(model.facts):
            print(f"note: {sentence}")
    print(args.out)
    return 0
