"""`score`: how good pictures are."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speed_engine.progress import wrapped

PLACES = "a folder of `sample` or `encode`, of classes or pictures, an .npz with arr_0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=Path, help=PLACES)
    parser.add_argument("--reference", help=f"digits, {PLACES}, or stored statistics")
    parser.add_argument("--out", type=Path, help="the JSON file (default: SAMPLES/score.json)")
    parser.add_argument(
        "--features",
        help="inception (default), pixels, or a TorchScript file; against the digits: their own",
    )
    parser.add_argument(
        "--trust-network",
        action="store_true",
        help="load the TorchScript file of --features: it is a program, so its code runs",
    )
    parser.add_argument(
        "--network-input",
        choices=("bytes", "unit", "signed"),
        default="bytes",
        help="what it is given: uint8 0..255, float 0..1, or float -1..1; [B, 3, H, W]",
    )
    parser.add_argument("--weights", type=Path, help="a local copy of Inception's weights")
    parser.add_argument("--resize", type=int, help="scale the pictures of both to this size")
    parser.add_argument("--vae", help="folder or hub name of the AutoencoderKL of encoded latents")
    parser.add_argument(
        "--store",
        type=Path,
        metavar="NPZ",
        help="keep the reference as statistics, to be given again",
    )
    parser.add_argument(
        "--clip",
        metavar="CLIP",
        help="also, or without --reference only: how well pictures fit their prompts, by this CLIP (folder or name)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="for --clip: a prompt a line, in turn (default: what `sample` was asked)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of subsets")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="reports side by side, if measured alike",
    )


def run(args: argparse.Namespace) -> int:
    if args.compare:
        from speed_engine.reports.scores import comparing

        if args.samples or args.reference:
            raise ValueError("--compare reads reports; leave out --samples and --reference")
        print("\n".join(comparing.compare(args.compare)))
        return 0
    if args.prompts and not args.clip:
        raise ValueError("--prompts belongs to --clip, the CLIP that compares; give both")
    if not args.samples or not (args.reference or args.clip):
        raise ValueError("give --samples and --reference, or reports to --compare")
    for name in ("batch_size", "resize"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    from speed_engine.reports.run_folder import device_of
    from speed_engine.reports.scores import Options, lines, score

    if args.clip:
        from speed_engine.commands.sample import prompts_of
        from speed_engine.reports.scores.clip_score import clip_score, line

        prompts = None if args.prompts is None else prompts_of(args.prompts)
        both = {"batch_size": args.batch_size, "device": device_of(args.device)}
        out = None if args.reference else args.out
        print(wrapped(line(clip_score(args.samples, args.clip, prompts, out, **both)), " " * 13))
        if not args.reference:
            return 0
    options = Options(
        features=args.features,
        given=args.network_input,
        trusted=args.trust_network,
        weights=args.weights,
        resize=args.resize,
        vae=args.vae,
        store=args.store,
        seed=args.seed,
        batch_size=args.batch_size,
        device=device_of(args.device),
    )
    report = score(args.samples, args.reference, args.out, options)
    print(wrapped("\n".join(lines.six(report)), " " * 13))
    for sentence in report["remarks"]:
        print(wrapped(f"note: {sentence}"), file=sys.stderr)
    for sentence in report["warnings"]:
        print(wrapped(f"WARNING: {sentence}"), file=sys.stderr)
    return 0
