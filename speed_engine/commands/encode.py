"""`encode`: images or arrays -> WebDataset shards with an index; by one process or by many."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speed_engine.progress import wrapped

if TYPE_CHECKING:
    from rich.console import Console

    from speed_engine.data.encode_set import Team
    from speed_engine.data.storage.scaling import Scale

AFTERWARDS = True  # what --verify holds without a folder
# What may be said beside each of the five things that the command does.
BELONGS = {
    "images": {
        *("out", "size", "mode", "channels", "shard_size", "min_side", "strict", "labels", "vae"),
        *("mean_only", "flip", "scale", "shift", "batch_size", "precision", "device"),
        *("captions", "text_encoder", "pooled_only", "texts_only", "low_resolution"),
    },
    "arrays": {"out", "shard_size", "scale", "shift", "posterior", "vae"},
    "latents": {"out", "shard_size", "scale", "shift", "vae"},
    "reindex": {"scale", "shift", "posterior", "num_classes", "vae"},
    "verify": set[str](),
}


def _scale(text: str) -> Scale:
    """`0.18215`, `0.2,0.3,0.25,0.2` or `auto`."""
    if text == "auto":
        return "auto"
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number, numbers with commas between them, or auto"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m speed_engine encode`."""
    add = parser.add_argument
    add(
        "--images",
        help="folder of images (a sub-folder is a class), WebDataset tars of images, parquet or arrow files of Hugging "
        "Face, a CIFAR archive, or `digits` or `glyphs`, which are on every machine",
    )
    add(
        "--arrays",
        type=Path,
        metavar="FILE",
        help="an .npz, or a folder of .npy: x [N, C, ...], label [N], any other [N, ...]",
    )
    add(
        "--latents",
        type=Path,
        metavar="PLACE",
        help="of another project: fast-DiT's folders, LightningDiT's safetensors, edm2's or REPA's folder or zip",
    )
    add("--out", type=Path, help="new folder for the shards")
    add("--size", type=int, help="pixels of a side (default 32; latents: must be given)")
    add(
        "--no-labels",
        dest="labels",
        action="store_const",
        const=False,
        help="sub-folders are no classes: all images below, without labels",
    )
    add("--mode", choices=("pixels", "latents"), help="what to store (default pixels)")
    add("--channels", type=int, help="3 = colour (default), 1 = grey")
    add("--shard-size", type=int, help="source images in a shard (default 10000)")
    add("--min-side", type=int, help="skip smaller images (default: a quarter of --size)")
    add("--strict", action="store_true", help="stop at the first image that is no good")
    add(
        "--vae",
        help="latents: folder or Hugging Face name of a diffusers AutoencoderKL; arrays, reindex: "
        "a note of which one made the latents",
    )
    add("--mean-only", action="store_true", help="latents: store no standard deviation")
    add("--flip", action="store_true", help="latents: store those of mirrored images too")
    add("--batch-size", type=int, help="latents: images at a time (default 32)")
    add("--precision", choices=("fp32", "bf16"), help="latents: of the VAE (default fp32)")
    add(
        "--device",
        help="latents: cpu, cuda, cuda:1 (default: cuda where there is one; of many processes each has its own)",
    )
    add(
        "--captions",
        type=Path,
        metavar="FILE",
        help="of the images: COCO's captions_*.json (tars have theirs as .txt); all of a picture are stored",
    )
    add(
        "--text-encoder",
        metavar="CLIP",
        help="folder or Hugging Face name of the CLIP that encodes the captions, once and for all",
    )
    add(
        "--pooled-only",
        action="store_true",
        help="captions: store one vector each, not one a token (77 times as much, for model.cross_attention)",
    )
    add(
        "--texts-only",
        action="store_true",
        help="captions: store no vectors; training then runs the CLIP on what it reads (conditions.text.encoder)",
    )
    add(
        "--low-resolution",
        type=int,
        metavar="N",
        help="store each picture reduced to N pixels a side beside it, for super-resolution; with --vae as latents",
    )
    add(
        "--verify",
        type=Path,
        nargs="?",
        const=AFTERWARDS,
        metavar="DIR",
        help="read every byte of a set and list all faults; without DIR, beside --images and others: of the set that "
        "was just written",
    )
    add("--reindex", type=Path, metavar="DIR", help="write the index of any WebDataset tars")
    add(
        "--scale",
        type=_scale,
        help="latents: x = (latent - shift) * scale; one number, one a channel with commas, or auto: "
        "each channel to mean 0, deviation 1 (default: the VAE's)",
    )
    add(
        "--shift",
        type=_scale,
        help="latents: see --scale (default: the VAE's, or 0); below zero: --shift=-1,2",
    )
    add("--posterior", action="store_true", help="arrays, reindex: mean and deviation are stacked")
    add("--num-classes", type=int, help="reindex: default is the largest label + 1")
    add(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="many processes: how long one may give no sign of life (default 120)",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say: 0, or 1 for a set with faults. Raises DataError, ValueError and OSError."""
    from rich.console import Console

    from speed_engine.data.encode_set import team_of, told_by_first
    from speed_engine.training.library_log import libraries_apart

    team = team_of(os.environ, **({} if args.patience is None else {"patience": args.patience}))
    with told_by_first(team):
        action, told = _checked(args)
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    if action in ("verify", "reindex"):
        if not team.first:
            return 0
        return _verify(args.verify) if action == "verify" else _reindex(args.reindex, told, console)
    with libraries_apart(team.rank) as log:
        _encode(action, getattr(args, action), told, console, team)
        log.into(args.out, lambda text: console.print(wrapped(text)))
    if args.verify is AFTERWARDS and team.first:
        return _verify(args.out)
    return 0


def _checked(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """(what to do, what is said about it). Raises DataError."""
    from speed_engine.data import DataError

    actions = [name for name in BELONGS if getattr(args, name) not in (None, AFTERWARDS)]
    if len(actions) != 1:
        raise DataError(
            "give one of --images DIR, --arrays FILE, --latents PLACE, --verify DIR and --reindex DIR"
        )
    (action,) = actions
    for name in ("out", "arrays", "latents", "verify", "reindex"):
        if isinstance(getattr(args, name), Path):
            setattr(args, name, getattr(args, name).expanduser())
    if args.verify is AFTERWARDS and action == "reindex":
        raise DataError("--verify without a folder belongs to --images, --arrays and --latents")
    if args.patience is not None and not args.patience >= 1:
        raise DataError("--patience must be at least 1 second")
    names = set[str]().union(*BELONGS.values())
    told: dict[str, Any] = {name: getattr(args, name) for name in names}
    told = {name: each for name, each in told.items() if each is not None and each is not False}
    if args.labels is False:
        told["labels"] = False
    for name in sorted(told.keys() - BELONGS[action]):
        where = " or ".join(f"--{each}" for each, its in BELONGS.items() if name in its)
        option = "--no-labels" if name == "labels" else f"--{name.replace('_', '-')}"
        raise DataError(f"{option} belongs to {where}, not to --{action}; leave it out")
    if isinstance(args.verify, Path) and not args.verify.is_dir():
        raise DataError(f"there is no folder {args.verify}; check --verify")
    if action not in ("verify", "reindex") and args.out is None:
        raise DataError("give --out DIR, a new folder for the shards")
    return action, told


def _encode(action: str, place: Any, told: dict[str, Any], console: Console, team: Team) -> None:
    if action == "arrays":
        from speed_engine.data.encode_arrays import encode_arrays as of
    elif action == "latents":
        from speed_engine.data.encode_latents import encode_latents as of
    else:
        from speed_engine.data.encode import encode as of
    of(place, console=console, team=team, **told)


def _verify(folder: Path) -> int:
    from speed_engine.data.storage.index import verify

    problems = verify(folder)
    for problem in problems:
        print(problem)
    print(f"{folder}: " + (f"{len(problems)} faults" if problems else "no fault"))
    return 1 if problems else 0


def _reindex(folder: Path, told: dict[str, Any], console: Console) -> int:
    from speed_engine.data.storage.index import reindex

    index = reindex(folder, **told)
    shape = " x ".join(map(str, index.shape))
    held = f"{index.count} samples, {index.kind} {shape}, {index.num_classes} classes"
    console.print(wrapped(f"{folder}: {held}, fingerprint {index.fingerprint}"))
    if index.shape[-1] in (1, 3) and index.shape[0] > index.shape[-1]:
        console.print(
            wrapped(
                f"note: {shape} is read as {index.shape[0]} channels; if the last number is the channels, write the "
                "arrays with it first"
            )
        )
    return 0
