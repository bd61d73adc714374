"""Files of a data set and of a checkpoint, cut short or with one bit flipped: each must be noticed when it is read.

A change that leaves the content as it was (white space of a JSON file, the padding behind the last sample of a tar) is
counted apart, and the content is compared. Where `verify` is what notices, because no sample is touched, it is asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from speed_engine.data import DataError
from speed_engine.data.shards import Shards
from speed_engine.data.storage.index import verify
from speed_engine.data.storage.writer import SetWriter
from speed_engine.training import checkpoint

NUM = 6
FLIPS, TRUNCATIONS = 180, 90  # of each file
Look = Callable[[], str]  # "refused", "same" or "unnoticed"


def sweep(run: Path, folder: Path, seed: int) -> dict[str, dict[str, int]]:
    """Damage to every file of a small set, written into `folder`, and of the newest checkpoint of `run`."""
    draw = random.Random(f"{seed} damage")
    found: dict[str, dict[str, int]] = {}
    for path, look in [*_set(folder / "set"), *_checkpoint(run)]:
        found[path.name] = damaged(path, look, draw)
    return found


def damaged(path: Path, look: Look, draw: random.Random) -> dict[str, int]:
    """How many changes of a file were refused, changed no content, or passed unnoticed. It is whole again then."""
    whole = path.read_bytes()
    counts = {"flips": FLIPS, "truncations": TRUNCATIONS, "refused": 0, "same": 0, "unnoticed": 0}
    for number in range(FLIPS + TRUNCATIONS):
        content = bytearray(whole)
        if number < FLIPS:
            content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(whole)) :]
        path.write_bytes(content)
        counts[look()] += 1
    path.write_bytes(whole)
    assert look() == "same", f"{path} was refused before anything was changed"
    return counts


def control(run: Path, seed: int) -> int:
    """Changes of a checkpoint's weights that pass when checksums are not compared: none would prove nothing."""
    (path, look), *_ = [each for each in _checkpoint(run) if each[0].name == "ema.safetensors"]
    with mock.patch.object(checkpoint, "_digest", lambda path, like: like):
        return damaged(path, look, random.Random(f"{seed} control"))["unnoticed"]


def _set(folder: Path) -> list[tuple[Path, Look]]:
    """One shard of six small pictures, and how each of its files is looked at."""
    pictures = np.random.default_rng(1).integers(0, 256, (NUM, 1, 4, 4), dtype=np.uint8)
    with SetWriter(folder, {}, shard_size=NUM) as writer:
        for i, array in enumerate(pictures):
            writer.write(i + 1, array, i)
        writer.finish()

    def look() -> str:
        try:
            stored = Shards(folder, retries=0).read(range(NUM))[0].numpy()
        except DataError:
            return "refused"
        if not np.array_equal(stored, pictures):
            return "unnoticed"
        return "refused" if verify(folder) else "same"

    return [
        (path, look)
        for path in sorted(folder.iterdir())
        if path.name.startswith(("shard", "index"))
    ]


def _checkpoint(run: Path) -> list[tuple[Path, Look]]:
    """Every file of the newest checkpoint, by what a resume and `sample` make of the folder."""
    found = checkpoint.newest(run, lambda text: None)
    assert found is not None
    folder, manifest = found.folder, found.manifest
    contents: dict[str, bytes] = {
        path.as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")
    }

    def look() -> str:
        try:
            read = checkpoint.verified(folder).manifest
        except checkpoint.CheckpointError:
            return "refused"
        same = all(Path(name).read_bytes() == content for name, content in contents.items())
        return "same" if same and read == manifest else "unnoticed"

    files: list[Any] = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(path, look) for path in files]
