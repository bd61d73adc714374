"""`encode --images`: images to shards, once, so that training never decodes an image.

A folder of images (a sub-folder is a class), tars or an archive become pixel shards, or latent shards through a VAE of
diffusers. Files that are no good are listed in `skipped.json` with the reason. What is common to all encoders, many
processes and continuing after a kill, is in `encode_set`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console

from speed_engine.conditions.clip import TextEncoder
from speed_engine.data import DataError, digits, encode_captions, glyphs
from speed_engine.data import low_resolution as low
from speed_engine.data.autoencoder import Vae
from speed_engine.data.encode_set import (
    ALONE,
    Fault,
    Job,
    Sample,
    Source,
    Team,
    counted,
    told_by_first,
    write_set,
)
from speed_engine.data.encode_set import size as byte_size
from speed_engine.data.storage import pictures, places, scaling
from speed_engine.data.storage.folders import shown
from speed_engine.data.storage.index import Index, StoredCondition
from speed_engine.data.storage.pictures import Listing, Picture, PictureError
from speed_engine.data.storage.scaling import Scale
from speed_engine.data.storage.shard_writer import sample_bytes
from speed_engine.progress import wrapped

DECODE_AHEAD = 64  # images in decoding at a time
# Words for --images: what is made, as what, and by which module.
MADE = {
    "digits": ("8 x 8 grey pixels", "scanned digits", digits),
    "glyphs": ("32 x 32 pixels in colour", "drawn glyphs", glyphs),
}


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
    device: str | None = None,
    captions: Path | None = None,
    text_encoder: str | None = None,
    pooled_only: bool = False,
    texts_only: bool = False,
    low_resolution: int | None = None,
    console: Console | None = None,
    team: Team = ALONE,
) -> Index | None:
    """Write the images (a folder, "digits" or "glyphs") as a set of shards into `out`; its index, on the first process.

    size: pixels of a side (default 32 of pixels; none of latents). channels: 3 (default) or 1.
    shard_size: source images of a shard, default 10,000. min_side: smaller images are skipped
    (default: a quarter of `size`). strict: the first bad image is an error. labels: whether
    sub-folders are classes. vae, mean_only (store no standard deviation), flip (store the latent of
    the mirrored image too), scale, shift (default: those of the VAE), batch_size, precision, device
    (default: cuda where there is one): for latents. captions: COCO's JSON; text_encoder: the CLIP that encodes them,
    or those of tars; pooled_only: without a vector a token; texts_only: without any vector (see `encode_captions`).
    low_resolution: pixels of a side of a picture that lies beside each (see the module of that name). team: the
    processes that share the work. Raises DataError. A set that is there already is left alone.
    """
    latents = mode == "latents"
    with told_by_first(team):
        if not latents and (scale, shift) != (None, None):
            raise DataError("--scale and --shift belong to latents; leave them out for pixels")
        if str(images) in MADE:
            unused = (size, channels, min_side, vae, scale, shift)
            latents = latents or text_encoder is not None
            if latents or strict or mean_only or flip or unused != (None,) * len(unused):
                raise DataError(
                    f"the {images} are {MADE[str(images)][0]}; leave out the other settings"
                )
            return _made(str(images), Path(out), shard_size, low_resolution, console, team)
        if latents != (vae is not None):
            raise DataError("--vae NAME and --mode latents belong together; give both or neither")
        if text_encoder is None and (captions is not None or pooled_only or texts_only):
            raise DataError(
                "--captions, --pooled-only and --texts-only need --text-encoder, the folder or hub name of their CLIP"
            )
        if not latents and (flip or mean_only or precision != "fp32"):
            raise DataError(
                "--flip and --mean-only belong to --mode latents, and so does --precision; leave them out for pixels"
            )
        if latents and size is None:
            raise DataError(
                "give --size, pixels of a side (256 for latents of ImageNet 256 x 256: 4 x 32 x 32)"
            )
        size = 32 if size is None else size
        channels = 3 if channels is None else channels
        shard_size = 10_000 if shard_size is None else shard_size
        if size < 1 or channels not in (1, 3) or batch_size < 1:
            raise DataError("--size and --batch-size must be at least 1, and --channels 1 or 3")
        if shard_size < 1:
            raise DataError("--shard-size must be at least 1")
        low.check(low_resolution, size)
    posterior = latents and not mean_only
    folder = Path(images).expanduser()
    min_side = max(1, size // 4) if min_side is None else min_side

    def prepare() -> Job:
        listing = places.find(folder, labels)
        if text_encoder is not None:
            listing = encode_captions.with_captions(listing, folder, captions)
        plan = {
            "images": hashlib.sha256(
                json.dumps([listing.pictures, listing.class_names]).encode()
            ).hexdigest(),
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
            **encode_captions.plan(listing, text_encoder, pooled_only, texts_only),
            **low.plan(low_resolution),
        }
        images = _Images(folder, listing, size, channels, min_side, strict, low_resolution, team)

        def begin() -> Source:
            if console is not None and team.first:
                for remark in listing.remarks:
                    console.print(wrapped(f"note: {remark}"))
                if listing.captions and text_encoder is None:
                    told = counted(len(listing.captions), "caption")
                    console.print(
                        wrapped(f"note: {told} (.txt) left out; --text-encoder CLIP stores them")
                    )
            if vae is None:
                source = images.source()
            else:
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                encoder = Vae(vae, _device(device, team), dtype)
                source = images.source(encoder, batch_size, posterior, flip, scale, shift)
            if text_encoder is None:
                return source
            reader = TextEncoder(text_encoder, _device(device, team))
            tokens, cores = not pooled_only, team.cores()
            return encode_captions.told(source, listing, reader, tokens, not texts_only, cores)

        return Job(plan, len(listing.pictures), shard_size, begin, posterior)

    return write_set(Path(out), prepare, console=console, team=team)


def _made(
    name: str,
    out: Path,
    shard_size: int | None,
    low_resolution: int | None,
    console: Console | None,
    team: Team,
) -> Index | None:
    """Pictures that are on every machine; seconds of work, which are not shared."""
    if not team.first:
        return None
    _, what, module = MADE[name]
    many = module.SHARD_SIZE if shard_size is None else shard_size
    index = module.write(out, shard_size=many, low_resolution=low_resolution)
    if console is not None:
        shards = counted(len(index.shards), "shard")
        console.print(wrapped(f"{index.count} {what} in {shards} in {out}"))
    return index


def _device(asked: str | None, team: Team) -> str:
    """The device of this process. Raises DataError."""
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if team.world == 1:
        return device
    if device == "cpu":
        return device
    if device != "cuda":
        raise DataError(
            f"--device {device} is one device for {team.world} processes; say --device cuda, and each takes its own"
        )
    if team.local_rank >= torch.cuda.device_count():
        raise DataError(
            f"process {team.local_rank} of this machine has no GPU of its own: torch sees {torch.cuda.device_count()}; "
            "start fewer processes"
        )
    return f"cuda:{team.local_rank}"


@dataclass(frozen=True)
class _Images:
    """The pictures of a place as samples of `size`."""

    folder: Path
    listing: Listing
    size: int
    channels: int
    min_side: int
    strict: bool
    low_resolution: int | None
    team: Team

    def source(
        self,
        encoder: Vae | None = None,
        batch_size: int = 32,
        posterior: bool = False,
        flip: bool = False,
        scale: Scale | None = None,
        shift: Scale | None = None,
    ) -> Source:
        """Pixels, or latents of `encoder`. Raises DataError for an encoder that does not fit."""
        size, channels, found = self.size, self.channels, self.listing.pictures
        if encoder and (size % encoder.factor or channels != encoder.channels):
            raise DataError(
                f"the VAE needs {encoder.channels} channels and a size divisible by "
                f"{encoder.factor}, not {channels} and {size}; correct --channels or --size"
            )
        side = self.low_resolution
        arrays = [channels * size**2] + ([] if side is None else [channels * side**2])
        conditions: dict[str, StoredCondition] = {}
        given = sum(picture.num_bytes for picture in found)
        said = f"{len(found)} images -> {channels} x {size} x {size} pixels"
        if encoder:
            scale = encoder.scale if scale is None else scale
            shift = encoder.shift if shift is None and scale != "auto" else shift
            scaling.check(scale, shift, encoder.latent_channels)
            inner = size // encoder.factor
            arrays = [2 * encoder.latent_channels * inner**2 * (1 + posterior)] * (1 + flip)
            said += f" -> latents {encoder.latent_channels} x {inner} x {inner}, scale {scale}"
            if side is not None:
                conditions[low.NAME], more = low.as_latents(encoder, side, flip)
                arrays += more
        if side is not None:
            said += f"; beside them {channels} x {side} x {side} pixels{' as latents' if encoder else ''}"
        each = sample_bytes(*arrays, label=found[0].label is not None)
        said += f"; {byte_size(given)} read, about {byte_size(len(found) * each)} written"
        said += f"; {_classes(found, self.listing.class_names)}"

        def items(numbers: range) -> Iterator[Sample | Fault]:
            if encoder is None:
                return self.pixels(numbers)
            found = self.pixels(numbers)
            return _encoded(found, encoder, batch_size, posterior, flip, self.team.cores())

        return Source(
            items,
            said,
            each,
            self.listing.class_names,
            scale,
            shift,
            encoder.identity if encoder else None,
            self.listing.others,
            conditions,
        )

    def pixels(self, numbers: range) -> Iterator[Sample | Fault]:
        """The pictures of these numbers, in their order; several are decoded at a time. Raises DataError if strict."""
        large = threading.Lock()
        found = self.listing.pictures[numbers.start : numbers.stop]

        def decode(picture: Picture) -> np.ndarray | PictureError:
            try:
                raw = self.listing.load(picture)
                return pictures.decode(raw, self.size, self.channels, self.min_side, large)
            except PictureError as error:
                return error

        with warnings.catch_warnings(), ThreadPoolExecutor(self.team.cores() + 4) as pool:
            warnings.filterwarnings("ignore", module="PIL")  # about odd files, which may be fine
            for begin in range(0, len(found), DECODE_AHEAD):
                some = found[begin : begin + DECODE_AHEAD]
                arrays = zip(some, pool.map(decode, some), strict=True)
                for number, (picture, array) in enumerate(arrays, numbers.start + begin):
                    if isinstance(array, np.ndarray):
                        arrays = low.beside(array, self.low_resolution)
                        yield Sample(number, array, picture.label, arrays=arrays)
                        continue
                    name = shown(picture.path)
                    if self.strict:
                        raise DataError(f"{self.folder}/{name}: {array}; repair or remove it")
                    yield Fault(number, name, str(array))


def _encoded(
    items: Iterator[Sample | Fault],
    encoder: Vae,
    batch_size: int,
    posterior: bool,
    flip: bool,
    cores: int,
) -> Iterator[Sample | Fault]:
    """Pixels to latents, `batch_size` at a time: the same batches whoever makes the shard."""
    batch: list[Sample] = []
    with _computed(encoder, posterior, cores) as latents_of:
        for one in items:
            if isinstance(one, Fault):
                yield one
                continue
            batch.append(one)
            if len(batch) == batch_size:
                yield from _latents(batch, latents_of, flip, posterior)
                batch = []
        if batch:
            yield from _latents(batch, latents_of, flip, posterior)


@contextlib.contextmanager
def _computed(
    encoder: Vae, posterior: bool, cores: int
) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Pixels [B, C, H, W] to latents, with the same bits whatever the number of processes.

    On a CPU the number of threads inside an operation decides the order of sums, so there it is one thread an image.
    """
    if torch.device(encoder.device).type != "cpu":
        yield lambda pixels: encoder.encode(pixels, posterior)
        return
    before = torch.get_num_threads()
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield lambda pixels: np.concatenate(
                list(pool.map(lambda one: encoder.encode(one[None], posterior), pixels))
            )
        finally:
            torch.set_num_threads(before)


def _latents(
    batch: list[Sample],
    latents_of: Callable[[np.ndarray], np.ndarray],
    flip: bool,
    posterior: bool,
) -> Iterator[Sample]:
    def both(pixels: np.ndarray) -> list[np.ndarray]:
        turned = [np.ascontiguousarray(pixels[..., ::-1])] if flip else []
        return [latents_of(each) for each in (pixels, *turned)]

    latents, *mirrored = both(np.stack([one.x for one in batch]))
    small: dict[str, np.ndarray] = {}
    if low.NAME in batch[0].arrays:
        found = both(np.stack([one.arrays[low.NAME] for one in batch]))
        means = [each[:, : each.shape[1] // (1 + posterior)] for each in found]
        small = dict(zip((low.NAME, f"{low.NAME}_mirrored"), means, strict=False))
    for i, one in enumerate(batch):
        flipped = mirrored[0][i] if mirrored else None
        arrays = {name: each[i] for name, each in small.items()}
        yield Sample(one.item, latents[i], one.label, flipped, arrays)


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
