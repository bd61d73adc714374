"""`encode --latents`: latents that another project made, to shards: its classes, its statistics, the mirrored ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rich.console import Console

from speed_engine.data.storage import foreign, scaling
from speed_engine.data.storage.index import Index
from speed_engine.data.storage.scaling import Scale
from speed_engine.data.storage.writer import SetWriter
from speed_engine.progress import progress


def encode_latents(
    place: Path,
    out: Path,
    *,
    scale: Scale | None = None,
    shift: Scale | None = None,
    vae: str | None = None,
    shard_size: int = 10_000,
    console: Console | None = None,
) -> Index:
    """Write the latents in `place` as a set of shards into `out`; its index. A set that is there already is left alone.

    scale, shift: x = (stored - shift) * scale; default: what the project that made them does. vae: which autoencoder
    made them, a note. The layouts are those of `storage.foreign`. Raises DataError.
    """
    console = console or Console(quiet=True)
    found = foreign.find(place, scale)
    first = found.read(0)
    if scale is None:
        scale, shift = found.scale, found.shift if shift is None else shift
    scaling.check(scale, shift, first.x.shape[0] // (1 + found.posterior))
    plan = {
        "latents": hashlib.sha256(json.dumps(found.files).encode()).hexdigest(),
        "project": found.project,
        "scale": scale,
        "shift": shift,
        "vae": vae,
        "shard_size": shard_size,
    }
    with SetWriter(out, plan, shard_size=shard_size, posterior=found.posterior) as writer:
        if writer.finished is not None:
            console.print(f"already there: {writer.finished.count} samples in {out}")
            return writer.finished
        also = [
            *(["mean and deviation"] if found.posterior else []),
            *(["mirrored ones"] if first.flipped is not None else []),
            "no labels" if first.label is None else "labels",
        ]
        size = found.count * first.x.nbytes * (1 + (first.flipped is not None)) / 2**30
        console.print(
            f"{found.count} latents of {found.project}'s layout: {first.x.dtype} "
            f"{' x '.join(map(str, first.x.shape))}, {', '.join(also)}; scale {scale}, shift {shift or 0}; "
            f"{size:.1f} GiB"
        )
        if writer.position:
            console.print(f"continuing after {writer.position} of {found.count} latents")
        with progress("encode", found.count, writer.position, console) as bar:
            for number in range(writer.position, found.count):
                latent = found.read(number)
                writer.write(number + 1, latent.x, latent.label, latent.flipped)
                bar.at(number + 1)
        index = writer.finish((), scale, shift, vae)
    console.print(f"{index.count} samples in {len(index.shards)} shards in {out}")
    return index
