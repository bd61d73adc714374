"""`sample`: pictures from the weights of a run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from speed_engine.commands import run_arguments
from speed_engine.commands.import_weights import foreign_arguments

if TYPE_CHECKING:
    from speed_engine.data import Facts


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"give a whole number from 1 up, not {text!r}")
    return int(text)


def _channels(text: str) -> int | Literal["all"]:
    return "all" if text == "all" else _at_least_one(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run_arguments(parser, required=False)
    parser.add_argument(
        "--weights",
        default="ema",
        help="of the run: ema (default) or model; without --run: a safetensors file of ours, a public .pt, or a "
        "diffusers folder",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="schedule.key=value", help="of weights that do not say it"
    )
    foreign_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="where the pictures go")
    parser.add_argument("--num", type=int, default=64, help="how many samples")
    parser.add_argument("--sampler", default="ddpm", help="ddpm, ddim, dpmpp, heun, or a module")
    parser.add_argument("--steps", type=int, default=250, help="noise levels that are visited")
    parser.add_argument(
        "--shift",
        type=float,
        default=1.0,
        help="of rectified flow: above 1 takes more levels at high noise",
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="1 = off")
    parser.add_argument(
        "--guidance-channels",
        type=_channels,
        default="all",
        help="all, or a number (3: as the released DiT)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", help="only this class, by number or name (default: in turn)")
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=REQUEST",
        help="what the network is told by this name, for all samples",
    )
    parser.add_argument(
        "--vae", help="folder or hub name of the AutoencoderKL that decodes latents"
    )
    parser.add_argument("--batch-size", type=_at_least_one, default=64)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import trained
    from speed_engine.reports.run_folder import device_of
    from speed_engine.sampling import folder, process

    if args.run is None:
        foreign = {
            "num_classes": args.num_classes,
            "num_heads": args.num_heads,
            "frequency_shift": args.frequency_shift,
        }
        if args.weights in ("ema", "model"):
            raise ValueError("give --run, a run folder, or --weights, a file or folder of weights")
        network = trained.of_file(Path(args.weights), args.overrides, args.trust, **foreign)
    elif args.weights not in ("ema", "model"):
        raise ValueError(
            f"--weights {args.weights}: of a run it is ema or model; leave out --run to take a file"
        )
    elif args.overrides:
        raise ValueError(f"a run says how it was trained; leave out {args.overrides[0]}")
    else:
        network = trained.of_run(args.run, args.weights, args.trust)
    for remark in network.remarks:
        print(f"note: {remark}")
    device = device_of(args.device)
    conditions = network.process.conditions
    recipe = process.Recipe(
        sampler=args.sampler,
        steps=args.steps,
        shift=args.shift,
        guidance=args.guidance,
        guidance_channels=args.guidance_channels,
        clip_x0=network.facts.space.kind == "pixels",
        seed=args.seed,
    )
    asked = dict(_asked(args))
    told: dict[str, Any] = {}
    for name in asked:
        if name not in conditions:
            there = ", ".join(conditions) or "nothing"
            raise ValueError(f"the network is not told {name}; it is told {there}")
    for name, condition in conditions.items():
        one = [asked[name]] * args.num if name in asked else None
        told |= condition.default(range(args.num)) if one is None else condition.asked(one)
    decode, stored = _saved_as(network.facts, args.vae, device)
    started = time.monotonic()
    folder.sample_to_folder(
        network.model.to(device),
        network.process,
        recipe,
        args.out,
        num=args.num,
        conditions_N=told or None,
        source=network.source,
        decode=decode,
        stored=stored,
        batch_size=args.batch_size,
        device=device,
    )
    print(f"{args.num} samples in {args.out} ({time.monotonic() - started:.0f} s)")
    return 0


def _saved_as(facts: Facts, vae: str | None, device: Any) -> tuple[Any, Any]:
    """(the way from model space to pictures, or to the arrays that `encode --arrays` takes); None: pixels as they are.

    Raises ValueError for latents of pictures without their VAE, and for a VAE with what is no latent of a picture.
    """
    from speed_engine.data import autoencoder
    from speed_engine.sampling import folder

    latents, flat = facts.space.kind == "latents", len(facts.shape) == 3
    if vae is not None and flat and latents:
        return autoencoder.decoder(facts.space, vae, device), None
    if vae is not None:
        raise ValueError(
            f"--vae decodes latents of pictures, and the run's samples are {facts.space.kind} of the shape "
            f"{list(facts.shape)}; leave it out"
        )
    if latents and flat:
        by = facts.space.vae
        raise ValueError(
            "the run was trained on latents; give --vae, the folder of its AutoencoderKL"
            f"{f' (its data were encoded by {by})' if by else ''}"
        )
    if flat and facts.shape[0] in (1, 3):
        return None, None
    return None, facts.space.to_stored if latents else folder.as_bytes


def _asked(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(condition, what is asked of it) of `--label` and every `--condition`."""
    if args.label is not None:
        yield "label", args.label
    for text in args.condition:
        name, equals, request = text.partition("=")
        if not equals or not name:
            raise ValueError(f"cannot read --condition {text}; write it as NAME=REQUEST")
        yield name, request
