"""Kind `digits`: the 1,797 handwritten digits of scikit-learn, 1 x 8 x 8 pixels, 10 classes.

Small enough for a laptop and for tests, and real. They are written once as ordinary pixel shards,
so that this kind takes the same path as every other; any number of processes may start at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from speed_engine.kinds import Section

from . import DataError
from . import low_resolution as low
from .shards import Shards
from .storage.index import INDEX, Index, load
from .storage.writer import SetWriter

NUM_DIGITS = 1797
SHARD_SIZE = 1000
SIDE = 8


class Config(Section):
    """The digits, in `path`. The first part is for training, the last `held_out` of them (other
    writers) for scoring.
    """

    kind: Literal["digits"] = "digits"
    path: str = Field("data/digits", description="folder of the shards; made when it is missing")
    part: Literal["train", "held_out"] = Field("train", description="which part to read")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the samples that training never sees"
    )
    low_resolution: int | None = Field(
        None,
        description="pixels of a side of a picture that lies beside each digit, for super-resolution; null: none",
    )


def build(config: Config) -> Shards:
    """The digits' shards, written first if they are not there. Raises DataError."""
    folder = Path(config.path).expanduser()
    if not (folder / INDEX).exists():
        write(folder, low_resolution=config.low_resolution, wait=True)
    index = load(folder)
    small = index.arrays.get(low.NAME)
    if (None if small is None else small.shape[-1]) != config.low_resolution:
        there = "no low resolution" if small is None else f"low_resolution={small.shape[-1]}"
        raise DataError(
            f"{folder} holds digits with {there}, and data.low_resolution is {config.low_resolution}; give another "
            "data.path"
        )
    if index.shape != (1, 8, 8) or index.count != NUM_DIGITS:
        raise DataError(f"{folder} holds something else than the digits; give another data.path")
    num_held_out = round(config.held_out * NUM_DIGITS)
    num_train = NUM_DIGITS - num_held_out
    if config.part == "train":
        return Shards(folder, count=num_train)
    if not num_held_out:
        raise DataError("data.part=held_out needs a data.held_out above 0")
    return Shards(folder, first=num_train, count=num_held_out)


def write(
    folder: Path,
    *,
    shard_size: int = SHARD_SIZE,
    low_resolution: int | None = None,
    wait: bool = False,
) -> Index:
    """Write the digits into `folder`; nothing happens if they are there. low_resolution: of a picture beside each, see
    the module of that name. wait: for another process that does so.
    """
    low.check(low_resolution, SIDE)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the digits come with scikit-learn; run `pip install scikit-learn`"
        ) from None

    plan = {"images": "digits", "shard_size": shard_size, **low.plan(low_resolution)}
    with SetWriter(folder, plan, shard_size=shard_size, wait=wait) as writer:
        if writer.finished is not None:
            return writer.finished
        values, labels = load_digits(return_X_y=True)  # values 0 to 16, [1797, 64]
        pixels = np.round(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
        for position in range(writer.position, len(pixels)):
            arrays = low.beside(pixels[position], low_resolution)
            writer.write(position + 1, pixels[position], int(labels[position]), arrays=arrays)
        return writer.finish(class_names=[str(name) for name in range(10)])
