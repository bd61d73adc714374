"""Kind `glyphs`: drawn letters and digits, 3 x 32 x 32 pixels, 62 classes; as many as wanted, no download.

Sample i is a pure function of (seed, i) (see `glyph_pictures`), so the true distribution is at hand: fresh draws tell
overfitting and copying from quality. They are written once as ordinary pixel shards, so that this kind takes the same
path as every other; any number of processes may start at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field

from speed_engine.kinds import Section
from speed_engine.progress import progress

from . import DataError, glyph_pictures
from . import low_resolution as low
from .shards import Shards
from .storage.index import INDEX, Index
from .storage.writer import PLAN, SetWriter

COUNT = 20_000
SHARD_SIZE = 10_000
SHAPE = (3, glyph_pictures.SIDE, glyph_pictures.SIDE)
BATCH = 500  # pictures drawn at a time


class Config(Section):
    """The glyphs, in `path`."""

    kind: Literal["glyphs"] = "glyphs"
    path: str = Field("data/glyphs", description="folder of the shards; made when it is missing")
    count: int = Field(
        COUNT, ge=1, le=glyph_pictures.FRESH, description="how many are drawn for the set"
    )
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="of the draws: sample i depends on (seed, i)"
    )


def build(config: Config) -> Shards:
    """The glyphs' shards, written first if they are not there. Raises DataError."""
    folder = Path(config.path).expanduser()
    if not (folder / INDEX).exists():
        write(folder, count=config.count, seed=config.seed, wait=True)
    made = json.loads((folder / PLAN).read_text()) if (folder / PLAN).exists() else {}
    if made.get("images") != "glyphs":
        raise DataError(f"{folder} holds something else than the glyphs; give another data.path")
    for key in ("count", "seed"):
        if made[key] != getattr(config, key):
            raise DataError(
                f"{folder} holds glyphs of {key} {made[key]}, not {getattr(config, key)}; give another data.path or "
                f"data.{key}={made[key]}"
            )
    return Shards(folder)


def write(
    folder: Path,
    *,
    count: int = COUNT,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    low_resolution: int | None = None,
    wait: bool = False,
) -> Index:
    """Draw the glyphs into `folder`; nothing happens if they are there. low_resolution: of a picture beside each, see
    the module of that name. wait: for another process that does so.

    Raises DataError without matplotlib, and where `folder` holds something else.
    """
    low.check(low_resolution, glyph_pictures.SIDE)
    plan = {
        "images": "glyphs",
        "count": count,
        "seed": seed,
        "shard_size": shard_size,
        "atlas": glyph_pictures.atlas().sha256,
        **low.plan(low_resolution),
    }
    with SetWriter(folder, plan, shard_size=shard_size, wait=wait) as writer:
        if writer.finished is not None:
            return writer.finished
        with progress("drawing glyphs", count, writer.position, show=sys.stderr.isatty()) as bar:
            for first in range(writer.position, count, BATCH):
                pixels, labels = glyph_pictures.draw(seed, first, min(BATCH, count - first))
                for i in range(len(pixels)):
                    arrays = low.beside(pixels[i], low_resolution)
                    writer.write(first + i + 1, pixels[i], int(labels[i]), arrays=arrays)
                bar.further(len(pixels))
        return writer.finish(class_names=list(glyph_pictures.CHARACTERS))
