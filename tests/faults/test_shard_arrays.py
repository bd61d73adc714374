"""Named arrays in shards: what is damaged, or other than the index says, is named and never read around."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speed_engine.data import DataError
from speed_engine.data.shards import Shards
from speed_engine.data.storage import scan as scan_file
from speed_engine.data.storage.index import Index, load, load_entries, reindex, save, verify
from speed_engine.data.storage.npy import PREFIX
from speed_engine.data.storage.writer import SetWriter

NUM, NAME = 6, "shard-000000.tar"
VECTOR = np.arange(NUM * 3, dtype=np.float32).reshape(NUM, 3) + 0.5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six small pictures with a vector and tokens, in two shards."""
    with SetWriter(tmp_path / "set", {}, shard_size=3) as writer:
        for i in range(NUM):
            arrays = {"vector": VECTOR[i], "tokens": np.array([i, i + 1], np.int32)}
            writer.write(i + 1, np.full((1, 4, 4), i, np.uint8), i % 2, None, arrays)
        writer.finish()
    return tmp_path / "set"


def save_entries(folder: Path, change: Callable[[np.ndarray], object]) -> None:
    """Entries of the first shard that were changed, with all checksums made to fit."""
    index = load(folder)
    entries = load_entries(folder, index, index.shards[0])
    change(entries)
    buffer = io.BytesIO()
    np.save(buffer, entries)
    (folder / "shard-000000.idx.npy").write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    shard = index.shards[0].model_copy(update={"entries_sha256": digest})
    save(index.model_copy(update={"shards": [shard, *index.shards[1:]]}).sealed(), folder)


@pytest.mark.parametrize("name", ["vector", "tokens"])
def test_a_damaged_array_is_found(folder: Path, name: str) -> None:
    index = load(folder)
    place = int(load_entries(folder, index, index.shards[0])[PREFIX + name][1])
    content = bytearray((folder / NAME).read_bytes())
    content[place] ^= 1
    (folder / NAME).write_bytes(content)
    source = Shards(folder, retries=0)
    assert np.array_equal(source.read([5, 0, 2])[1]["vector"].numpy(), VECTOR[[5, 0, 2]])
    with pytest.raises(DataError, match=rf"{NAME}, sample 1: damaged, its CRC32"):
        source.read([0, 1])
    assert [fault[: len(NAME) + 10] for fault in verify(folder)] == [f"{NAME}, sample 1"]


CHANGES: dict[str, tuple[Callable[[Index], dict[str, Any]], str]] = {
    "shape": (lambda index: named(index, shape=(2,)), r"'vector' is float32 \(3,\), but the index"),
    "dtype": (lambda index: named(index, dtype="int32"), r"the index says int32 \(3,\)"),
    "x shape": (lambda _: {"shape": (2, 2, 4), "mean": [0, 0], "std": [1, 1]}, r"'x' is uint8"),
    "x dtype": (
        lambda _: {"dtype": "float16", "shape": (1, 2, 4), "kind": "latents"},
        r"'x' is uint8 \(1, 4, 4\), but the index says float16 \(1, 2, 4\)",
    ),
}


def named(index: Index, **changes: Any) -> dict[str, Any]:
    arrays = index.arrays
    return {"arrays": arrays | {"vector": arrays["vector"].model_copy(update=changes)}}


@pytest.mark.parametrize("case", CHANGES)
def test_an_array_that_is_not_what_the_index_says(folder: Path, case: str) -> None:
    """As where the index of another set was put there; all checksums fit."""
    change, reason = CHANGES[case]
    index = load(folder)
    save(index.model_copy(update=change(index)).sealed(), folder)
    source = Shards(folder, check_scale=False)
    place = rf"shard-000001\.tar, sample 1: .*{reason}.*rebuild the index with .*--reindex"
    with pytest.raises(DataError, match=place):
        source.read([4])
    assert len(verify(folder)) == NUM
    (folder / "index.json").unlink()
    reindex(folder)
    assert verify(folder) == [] and Shards(folder).fingerprint == index.fingerprint


def test_entries_that_point_beside_an_array(folder: Path) -> None:
    def beside(entries: np.ndarray) -> None:
        entries[PREFIX + "vector"][2] += 4

    save_entries(folder, beside)
    with pytest.raises(DataError, match=rf"{NAME}, sample 2: .*'vector', none begins"):
        Shards(folder).read([2])

    def outside(entries: np.ndarray) -> None:
        entries[PREFIX + "tokens"][1] = 10**6

    save_entries(folder, outside)
    with pytest.raises(DataError, match=rf"{NAME}, sample 1: its index entry points outside"):
        Shards(folder)


def test_arrays_that_differ_within_a_set(tmp_path: Path) -> None:
    def pair(first: dict[str, Any], second: dict[str, Any], shard_size: int) -> None:
        with SetWriter(tmp_path / "set", {"size": shard_size}, shard_size=shard_size) as writer:
            for number, arrays in enumerate((first, second)):
                writer.write(number + 1, np.zeros((1, 2, 2), np.uint8), None, None, arrays)
            writer.finish()

    vector = {"vector": VECTOR[0]}
    for other in (np.zeros(2, np.float32), np.zeros(3, np.float16)):
        with pytest.raises(DataError, match=r"sample 1: its array 'vector' is .* the first of"):
            pair(vector, {"vector": other}, 2)
    with pytest.raises(DataError, match="sample 1: some samples have an array 'vector'"):
        pair(vector, {}, 2)
    with pytest.raises(DataError, match="sample 1: its array 'vector' holds NaN"):
        pair(vector, {"vector": np.full(3, np.nan, np.float32)}, 2)
    with pytest.raises(DataError, match=r"sample 0: its array has the empty shape \(0,\)"):
        pair({"vector": VECTOR[0, :0]}, {}, 1)
    with pytest.raises(DataError, match=r"shard-000001\.tar has arrays .* but shard-000000\.tar"):
        pair(vector, {}, 1)


def test_a_sample_beyond_the_entries_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_file, "MAX_SAMPLE_BYTES", 4000)
    with pytest.raises(DataError, match=rf"{NAME}, sample 0: it has \d+ bytes, more than 4000"):
        reindex(folder)
