"""`python -m speed_engine encode`: images to shards, once, so that training never decodes an image.

A folder of images (a sub-folder is a class) becomes pixel shards, or latent shards through a VAE of
diffusers. Work is committed shard by shard: a killed run continues when the same command is given
again. Files that are no good are listed in `skipped.json` with the reason. The same command checks
a set (`--verify`) and writes the index of shards from elsewhere (`--reindex`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from speed_engine.data import DataError, digits
from speed_engine.data.autoencoder import Vae
from speed_engine.data.encode_arrays import encode_arrays
from speed_engine.data.encode_latents import encode_latents
from speed_engine.data.storage import pictures, places, scaling
from speed_engine.data.storage.folders import shown
from speed_engine.data.storage.index import Index, reindex, verify
from speed_engine.data.storage.pictures import Listing, Picture, PictureError
from speed_engine.data.storage.scaling import Scale
from speed_engine.data.storage.writer import SetWriter
from speed_engine.progress import progress

DECODE_AHEAD = 64  # images in decoding at a time


def encode(
    images: Path | str,
    out: Path,
    *,
    size: int | None = None,
    mode: Literal["pixels", "latents"] = "pixels",
    channels: int | None = None,
    shard_size: int | None = None,
    min_side: int | None = None,
    strict: bool = False,
    labels: bool = True,
    vae: str | None = None,
    mean_only: bool = False,
    flip: bool = False,
    scale: Scale | None = None,
    shift: Scale | None = None,
    batch_size: int = 32,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "cpu",
    console: Console | None = None,
) -> Index:
    """Write the images (a folder, or "digits") as a set of shards into `out`; its index.

    size: pixels of a side (default 32 of pixels; none of latents). channels: 3 (default) or 1.
    shard_size: default 10,000. min_side: smaller images are skipped (default: a quarter of `size`).
    strict: the first bad image is an error. labels: whether sub-folders are classes.
    vae, mean_only (store no standard deviation), flip (store the latent of the
    mirrored image too), scale, shift (default: those of the VAE), batch_size, precision, device: for latents.
    Raises DataError. A set that is there already is left alone.
    """
    console = console or Console(quiet=True)
    if mode == "pixels" and (scale is not None or shift is not None):
        raise DataError("--scale and --shift belong to latents; leave them out for pixels")
    if str(images) == "digits":
        unused = (size, channels, min_side, vae)
        if (
            mode != "pixels"
            or strict
            or mean_only
            or flip
            or scale
            or shift
            or unused != (None,) * len(unused)
        ):
            raise DataError("the digits are 8 x 8 grey pixels; leave out the other settings")
        index = digits.write(
            Path(out), shard_size=digits.SHARD_SIZE if shard_size is None else shard_size
        )
        console.print(f"{index.count} scanned digits in {len(index.shards)} shards in {out}")
        return index
    sized, size = size is not None, 32 if size is None else size
    channels = 3 if channels is None else channels
    shard_size = 10_000 if shard_size is None else shard_size
    if size < 1 or channels not in (1, 3) or batch_size < 1:
        raise DataError("--size and --batch-size must be at least 1, and --channels 1 or 3")
    latents = mode == "latents"
    if latents != (vae is not None):
        raise DataError("--vae NAME and --mode latents belong together; give both or neither")
    if not latents and (flip or mean_only or precision != "fp32"):
        raise DataError(
            "--flip and --mean-only belong to --mode latents, and so does --precision; leave them out for pixels"
        )
    if latents and not sized:
        raise DataError(
            "give --size, pixels of a side (256 for latents of ImageNet 256 x 256: 4 x 32 x 32)"
        )
    posterior = latents and not mean_only
    folder = Path(images).expanduser()
    min_side = max(1, size // 4) if min_side is None else min_side
    listing = places.find(folder, labels)
    found, class_names = listing.pictures, listing.class_names
    plan = {
        "images": hashlib.sha256(json.dumps([found, class_names]).encode()).hexdigest(),
        "mode": mode,
        "size": size,
        "channels": channels,
        "min_side": min_side,
        "shard_size": shard_size,
        "vae": vae,
        "posterior": posterior,
        "flip": flip,
        "batch_size": batch_size if latents else None,
        **({} if precision == "fp32" else {"precision": precision}),
        **({} if scale is None else {"scale": scale}),
        **({} if shift is None else {"shift": shift}),
    }
    with SetWriter(out, plan, shard_size=shard_size, posterior=posterior) as writer:
        if writer.finished is not None:
            console.print(f"already there: {writer.finished.count} samples in {out}")
            return writer.finished
        if writer.position:
            console.print(f"continuing after {writer.position} of {len(found)} images")
        if not writer.position:
            for name, reason in listing.others:
                writer.skip(name, reason)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        encoder = Vae(vae, device, dtype) if vae is not None else None
        for remark in listing.remarks:
            console.print(f"note: {remark}")
        if encoder and (size % encoder.factor or channels != encoder.channels):
            raise DataError(
                f"the VAE needs {encoder.channels} channels and a size divisible by "
                f"{encoder.factor}, not {channels} and {size}; correct --channels or --size"
            )
        if encoder:
            scale = encoder.scale if scale is None else scale
            shift = encoder.shift if shift is None and scale != "auto" else shift
            scaling.check(scale, shift, encoder.latent_channels)
        said, each = (
            f"{len(found)} images -> {channels} x {size} x {size} pixels",
            channels * size**2,
        )
        if encoder:
            side = size // encoder.factor
            each = 2 * encoder.latent_channels * side**2 * (1 + posterior) * (1 + flip)  # float16
            said += f" -> latents {encoder.latent_channels} x {side} x {side}, scale {scale}"
        said += f"; about {len(found) * each / 2**30:.2g} GiB"
        console.print(f"{said}; {_classes(found, class_names)}")
        done, total, started = writer.position, len(found), time.monotonic()
        with progress("encode", total, done, console) as bar, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # about odd files, which may be fine
            batch: list[tuple[int, Picture, np.ndarray]] = []
            rest = found[writer.position :]
            for position, picture, array in _decoded(
                listing, rest, writer.position, size, channels, min_side
            ):
                if isinstance(array, PictureError):
                    name = shown(picture.path)
                    if strict:
                        raise DataError(f"{folder}/{name}: {array}; repair or remove it")
                    writer.skip(name, str(array))
                else:
                    batch.append((position, picture, array))
                if len(batch) == min(batch_size, writer.room):
                    _write(writer, batch, encoder, posterior, flip)
                    batch = []
                bar.at(position)
            _write(writer, batch, encoder, posterior, flip)
        index = writer.finish(class_names, scale, shift, encoder.identity if encoder else None)
        rate = (total - done) / max(time.monotonic() - started, 1e-9)
        console.print(
            f"{index.count} samples in {len(index.shards)} shards in {out} ({rate:.0f} images/s)"
        )
        if writer.skipped:
            console.print(f"{len(writer.skipped)} files skipped, listed in {out}/skipped.json")
        return index


def _decoded(
    listing: Listing, found: list[Picture], first: int, size: int, channels: int, min_side: int
) -> Iterator[tuple[int, Picture, np.ndarray | PictureError]]:
    """(number of files dealt with, picture, array or what is wrong with it), in order."""

    large = threading.Lock()

    def decode(picture: Picture) -> np.ndarray | PictureError:
        try:
            return pictures.decode(listing.load(picture), size, channels, min_side, large)
        except PictureError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for begin in range(0, len(found), DECODE_AHEAD):
            some = found[begin : begin + DECODE_AHEAD]
            for i, (picture, array) in enumerate(zip(some, pool.map(decode, some), strict=True)):
                yield first + begin + i + 1, picture, array


def _write(
    writer: SetWriter,
    batch: list[tuple[int, Picture, np.ndarray]],
    encoder: Vae | None,
    posterior: bool,
    flip: bool,
) -> None:
    if not batch:
        return
    arrays = np.stack([array for _, _, array in batch])
    mirrored = None
    if encoder:
        pixels = arrays
        arrays = encoder.encode(pixels, posterior)
        if flip:
            mirrored = encoder.encode(np.ascontiguousarray(pixels[..., ::-1]), posterior)
    for i, (position, picture, _) in enumerate(batch):
        flipped = None if mirrored is None else mirrored[i]
        writer.write(position, arrays[i], picture.label, flipped)


def _classes(found: list[Picture], names: list[str], most: int = 10) -> str:
    """Which number is which class, and how many images it has."""
    if not names and found[0].label is not None:
        return f"labels up to {max(picture.label or 0 for picture in found)}"
    if not names:
        return "no classes"
    counts = Counter(picture.label for picture in found)
    each = [f"{number} = {name} ({counts[number]})" for number, name in enumerate(names[:most])]
    more = f" ... {len(names) - 1} = {names[-1]}" if len(names) > most else ""
    return f"{len(names)} classes: {', '.join(each)}{more}"


# What may be said beside each of the five things that the command does.
BELONGS = {
    "images": {
        *("out", "size", "mode", "channels", "shard_size", "min_side", "strict", "labels", "vae"),
        *("mean_only", "flip", "scale", "shift", "batch_size", "precision", "device"),
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
        help="folder of images (a sub-folder is a class), WebDataset tars of images, a CIFAR archive, or `digits`",
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
    add("--shard-size", type=int, help="samples in a shard (default 10000)")
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
    add("--device", help="latents: cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--verify", type=Path, metavar="DIR", help="read every byte of a set and list all faults")
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


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say: 0, or 1 for a set with faults. Raises DataError and OSError."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    actions = [name for name in BELONGS if getattr(args, name) is not None]
    if len(actions) != 1:
        raise DataError(
            "give one of --images DIR, --arrays FILE, --latents PLACE, --verify DIR and --reindex DIR"
        )
    (action,) = actions
    for name in ("out", "arrays", "latents", "verify", "reindex"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).expanduser())
    names = set[str]().union(*BELONGS.values())
    told: dict[str, Any] = {name: getattr(args, name) for name in names}
    told = {name: each for name, each in told.items() if each is not None and each is not False}
    if args.labels is False:
        told["labels"] = False
    for name in sorted(told.keys() - BELONGS[action]):
        where = " or ".join(f"--{each}" for each, its in BELONGS.items() if name in its)
        option = "--no-labels" if name == "labels" else f"--{name.replace('_', '-')}"
        raise DataError(f"{option} belongs to {where}, not to --{action}; leave it out")
    if action == "verify":
        if not args.verify.is_dir():
            raise DataError(f"there is no folder {args.verify}; check --verify")
        problems = verify(args.verify)
        for problem in problems:
            print(problem)
        print(f"{args.verify}: " + (f"{len(problems)} faults" if problems else "no fault"))
        return 1 if problems else 0
    if action == "reindex":
        index = reindex(args.reindex, **told)
        shape = " x ".join(map(str, index.shape))
        console.print(
            f"{args.reindex}: {index.count} samples, {index.kind} {shape}, {index.num_classes} classes, "
            f"fingerprint {index.fingerprint}"
        )
        if index.shape[-1] in (1, 3) and index.shape[0] > index.shape[-1]:
            console.print(
                f"note: {shape} is read as {index.shape[0]} channels; if the last number is the channels, write the "
                "arrays with it first"
            )
        return 0
    if args.out is None:
        raise DataError("give --out DIR, a new folder for the shards")
    if action != "images":
        of = encode_arrays if action == "arrays" else encode_latents
        of(getattr(args, action), console=console, **told)
        return 0
    told.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    encode(args.images, console=console, **told)
    return 0
