"""`encode --latents`: latents that another project made, to shards: its classes, its statistics, the mirrored ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from speed_engine.data.encode_set import ALONE, Job, Sample, Source, Team, write_set
from speed_engine.data.encode_set import size as byte_size
from speed_engine.data.storage import foreign, scaling
from speed_engine.data.storage.index import Index
from speed_engine.data.storage.scaling import Scale
from speed_engine.data.storage.shard_writer import sample_bytes


def encode_latents(
    place: Path,
    out: Path,
    *,
    scale: Scale | None = None,
    shift: Scale | None = None,
    vae: str | None = None,
    shard_size: int = 10_000,
    console: Console | None = None,
    team: Team = ALONE,
) -> Index | None:
    """Write the latents in `place` as a set of shards into `out`; its index, on the first process. A set that is there
    already is left alone.

    scale, shift: x = (stored - shift) * scale; default: what the project that made them does. vae: which autoencoder
    made them, a note. team: the processes that share the work. The layouts are those of `storage.foreign`. Raises
    DataError.
    """

    def prepare() -> Job:
        found = foreign.find(place, scale)
        first = found.read(0)
        known, shifted = scale, shift
        if scale is None:
            known, shifted = found.scale, found.shift if shift is None else shift
        scaling.check(known, shifted, first.x.shape[0] // (1 + found.posterior))
        plan = {
            "latents": hashlib.sha256(json.dumps(found.files).encode()).hexdigest(),
            "project": found.project,
            "scale": known,
            "shift": shifted,
            "vae": vae,
            "shard_size": shard_size,
        }
        also = [
            *(["mean and deviation"] if found.posterior else []),
            *(["mirrored ones"] if first.flipped is not None else []),
            "no labels" if first.label is None else "labels",
        ]
        arrays = [first.x.nbytes] * (1 + (first.flipped is not None))
        each = sample_bytes(*arrays, label=first.label is not None)
        said = (
            f"{found.count} latents of {found.project}'s layout: {first.x.dtype} "
            f"{' x '.join(map(str, first.x.shape))}, {', '.join(also)}; scale {known}, shift {shifted or 0}; "
            f"about {byte_size(found.count * each)}"
        )

        def items(numbers: range) -> Iterator[Sample]:
            for number in numbers:
                latent = found.read(number)
                yield Sample(number, latent.x, latent.label, latent.flipped)

        source = Source(items, said, each, (), known, shifted, vae)
        return Job(plan, found.count, shard_size, lambda: source, found.posterior, "latents")

    return write_set(out, prepare, console=console, team=team)
