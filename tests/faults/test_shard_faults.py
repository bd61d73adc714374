"""Damaged, foreign and hostile shards: never a lost sample without a word, always the place."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from speed_engine.data import DataError, shards
from speed_engine.data.shards import Shards
from speed_engine.data.storage import scan as scan_file
from speed_engine.data.storage import writer as writer_file
from speed_engine.data.storage.index import load_entries, reindex, verify
from speed_engine.data.storage.scan import scan
from speed_engine.data.storage.sound import sound
from speed_engine.data.storage.writer import SetWriter

NUM, SIZE = 5, 4
NAME = "shard-000000.tar"


def stored() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (NUM, 1, SIZE, SIZE), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One shard with five samples."""
    with SetWriter(tmp_path / "set", {}, shard_size=NUM) as writer:
        for i, array in enumerate(stored()):
            writer.write(i + 1, array, i)
        writer.finish()
    return tmp_path / "set"


def read_all(folder: Path) -> np.ndarray:
    return Shards(folder, retries=0).read(range(NUM))[0].numpy()


# --- damage -------------------------------------------------------------------------------------


def test_truncation_sweep(folder: Path) -> None:
    whole = (folder / NAME).read_bytes()
    ends = load_entries(folder, Shards(folder).index, Shards(folder).index.shards[0])
    ends = ends["start"] + ends["length"]
    for size in [*range(0, len(whole), 61), *range(511, len(whole), 512), len(whole) - 1]:
        (folder / NAME).write_bytes(whole[:size])
        lost = int((ends <= size).sum())  # the first sample that is not complete
        with pytest.raises(DataError) as caught:
            read_all(folder)
        assert NAME in str(caught.value) and f"{size} bytes" in str(caught.value)
        if lost < NUM:
            assert f"sample {lost} and all after it" in str(caught.value)
            with pytest.raises(DataError, match=rf"{NAME}(, sample {lost}:| is empty)"):
                scan(folder / NAME)
        assert len(verify(folder)) == 1


def test_bit_flip_sweep(folder: Path) -> None:
    whole = (folder / NAME).read_bytes()
    entries = load_entries(folder, Shards(folder).index, Shards(folder).index.shards[0])
    end = int(entries["start"][-1] + entries["length"][-1])
    rng = np.random.default_rng(2)
    positions = {*rng.integers(0, len(whole), 250).tolist(), 0, end - 1, end, len(whole) - 1}
    for position in sorted(positions):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        (folder / NAME).write_bytes(damaged)
        if position < end:
            sample = int(np.searchsorted(entries["start"], position, side="right")) - 1
            place = f"{NAME}, sample {sample}: damaged"
            source = Shards(folder, retries=0)
            with pytest.raises(DataError, match=re.escape(place)):
                source.read(range(NUM))
            others = [i for i in range(NUM) if i != sample]
            assert np.array_equal(source.read(others)[0].numpy(), stored()[others])
            assert [fault[: len(place)] for fault in verify(folder)] == [place]
        else:  # behind the last sample: nothing is lost, and `verify` sees it
            assert np.array_equal(read_all(folder), stored())
            assert len(verify(folder)) == 1 and "outside of its samples" in verify(folder)[0]


def test_bit_flips_of_headers_never_shorten_a_reindex(folder: Path) -> None:
    """The stock reader takes a broken header for the end; the scan must not."""
    whole = (folder / NAME).read_bytes()
    for header in range(0, len(whole) - 10240 + 5 * 2048, 512):
        if whole[header + 257 : header + 262] != b"ustar":
            continue
        for byte in range(0, 345, 13):
            damaged = bytearray(whole)
            damaged[header + byte] ^= 4
            (folder / NAME).write_bytes(damaged)
            with pytest.raises(DataError, match=rf"{NAME}, sample {header // 2048}:"):
                scan(folder / NAME)


def test_flips_of_the_index_files_are_found(folder: Path) -> None:
    for name in ("shard-000000.idx.npy", "index.json"):
        whole = (folder / name).read_bytes()
        for position in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            (folder / name).write_bytes(damaged)
            try:
                with pytest.raises(DataError, match=rf"{name}.*--reindex"):
                    read_all(folder)
            except pytest.fail.Exception:  # white space of the JSON file is no content
                assert name == "index.json" and chr(whole[position]).isspace()
                assert np.array_equal(read_all(folder), stored())
        (folder / name).write_bytes(whole)


def test_a_shard_that_shrinks_under_an_open_source(folder: Path) -> None:
    source = Shards(folder, retries=0)
    source.read(range(NUM))
    os.truncate(folder / NAME, 3 * 2048 + 100)
    assert np.array_equal(source.read([0, 2])[0].numpy(), stored()[[0, 2]])
    with pytest.raises(DataError, match=rf"{NAME}, sample 4: the file ends before it"):
        source.read([0, 4])


def test_passing_read_errors_are_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = os.pread, 2

    def failing(*args: int) -> bytes:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    def broken(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(shards.os, "pread", failing)
    monkeypatch.setattr(shards.os, "preadv", broken)
    monkeypatch.setattr(
        shards, "sound", lambda columns, entries, files: np.zeros(len(entries), bool)
    )
    assert np.array_equal(Shards(folder).read([3, 1])[0].numpy(), stored()[[3, 1]])
    failures = 100
    with pytest.raises(DataError, match=rf"{NAME}, sample 0: cannot be read \(Input/output error"):
        Shards(folder).read([0])


def test_many_checked_at_once_are_judged_as_each_alone(folder: Path) -> None:
    """One bit flipped in every sixth byte of a shard in turn: what one read of many finds, each careful read does."""
    whole = (folder / NAME).read_bytes()
    generator = np.random.default_rng(0)
    seen = set()
    for place in range(0, len(whole), 6 * 37):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        (folder / NAME).write_bytes(damaged)
        source = Shards(folder, retries=0)
        files = source._descriptor[source._shard]
        found = sound(source._columns, source._entries, files)
        for sample in range(NUM):
            try:
                source._region(sample)
                alone = True
            except DataError:
                alone = False
            assert found[sample] == alone, (place, sample)
        seen.add(int(found.sum()))
    assert seen == {NUM, NUM - 1}


# --- index and shards that do not belong together -----------------------------------------------


def test_missing_and_foreign_indexes(folder: Path, tmp_path: Path) -> None:
    with SetWriter(tmp_path / "other", {}, shard_size=NUM) as writer:
        for i, array in enumerate(255 - stored()):
            writer.write(i + 1, array, i)
        writer.finish()
    other = tmp_path / "other"
    index = (folder / "index.json").read_bytes()
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"has shards but no index\.json; make one with"):
        Shards(folder)
    (folder / "index.json").write_bytes(index)
    entries = (folder / "shard-000000.idx.npy").read_bytes()
    (folder / "shard-000000.idx.npy").write_bytes((other / "shard-000000.idx.npy").read_bytes())
    with pytest.raises(DataError, match=r"idx\.npy is damaged or belongs to another shard"):
        Shards(folder)
    (folder / "shard-000000.idx.npy").write_bytes(entries)
    (folder / NAME).write_bytes((other / NAME).read_bytes())  # same size, other samples
    with pytest.raises(DataError, match=rf"{NAME}, sample 2: damaged"):
        Shards(folder, retries=0).read([2])
    assert len(verify(folder)) == NUM
    reindex(folder)
    assert np.array_equal(read_all(folder), 255 - stored())
    (folder / NAME).unlink()
    with pytest.raises(DataError, match=rf"{NAME} cannot be read"):
        Shards(folder)
    with pytest.raises(DataError, match="holds no data set"):
        Shards(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "something"},
        {"count": 4},
        {"extra": 1},
        {"shards": []},
        {"num_classes": 3},
    ],
)
def test_edited_indexes_are_refused(folder: Path, change: dict[str, object]) -> None:
    content = json.loads((folder / "index.json").read_text()) | change
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"index\.json .*rebuild it with"):
        Shards(folder)


@pytest.mark.parametrize("name", ["../set/shard-000000.tar", "/etc/x.tar", "a/b.tar", ".x.tar"])
def test_an_index_cannot_point_outside(folder: Path, name: str) -> None:
    index = Shards(folder).index
    shard = index.shards[0].model_copy(update={"name": name})
    sealed = index.model_copy(update={"shards": [shard]}).sealed()
    (folder / "index.json").write_text(json.dumps(sealed.model_dump()))
    with pytest.raises(DataError, match="outside of its folder"):
        Shards(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", 10**9),
        ("offset", 0),
        ("start", -1),
        ("length", 2**30),
        ("label", 5),
        ("label", -1),
    ],
)
def test_entries_must_point_into_the_shard(folder: Path, column: str, value: int) -> None:
    """Also where all checksums were made to fit."""
    index = Shards(folder).index
    entries = load_entries(folder, index, index.shards[0])
    entries[column][1] = value
    buffer = io.BytesIO()
    np.save(buffer, entries)
    (folder / "shard-000000.idx.npy").write_bytes(buffer.getvalue())
    digest = scan_file.hashlib.sha256(buffer.getvalue()).hexdigest()
    shard = index.shards[0].model_copy(update={"entries_sha256": digest})
    sealed = index.model_copy(update={"shards": [shard]}).sealed()
    (folder / "index.json").write_text(json.dumps(sealed.model_dump()))
    with pytest.raises(DataError, match=rf"{NAME}, sample 1: its index entry"):
        Shards(folder)


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*\.tar"):
        reindex(tmp_path)
    with pytest.raises(DataError, match="holds no data set"):
        Shards(tmp_path)
    with (
        SetWriter(tmp_path / "out", {}, shard_size=2) as writer,
        pytest.raises(DataError, match="no image to write"),
    ):
        writer.finish()


def test_each_epoch_of_uneven_shards_visits_every_sample_once(tmp_path: Path) -> None:
    with SetWriter(tmp_path / "set", {}, shard_size=4) as writer:
        for i in range(9):
            writer.write(i + 1, np.full((1, 2, 2), i, np.uint8), None)
        writer.finish()
    source = Shards(tmp_path / "set")
    order = np.random.default_rng(0).permutation(9)
    found = [int(source.read([i])[0].flatten()[0]) for i in order]
    assert found == order.tolist() and sorted(found) == list(range(9))


# --- a writer that is killed --------------------------------------------------------------------


def write_seven(out: Path) -> str:
    with SetWriter(out, {"what": "seven"}, shard_size=3) as writer:
        if writer.finished is None:
            for i in range(writer.position, 7):
                writer.write(i + 1, np.full((1, 2, 2), i, np.uint8), i)
            writer.finished = writer.finish()
        return writer.finished.fingerprint


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a fork; its exit status."""
    child = os.fork()
    if not child:
        status = 3
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_writer_killed_between_any_two_steps_is_continued(tmp_path: Path) -> None:
    """The child dies before its n-th fsync, rename, replace or unlink, for every n there is."""
    expected = write_seven(tmp_path / "undisturbed")
    step = 0
    while True:
        out = tmp_path / f"out{step}"

        def killed(last: int = step, out: Path = out) -> None:
            left = last

            def counted(name: str, real: Callable[..., None]) -> Callable[..., None]:
                def call(*args: object, **kwargs: object) -> None:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os._exit(9)
                    real(*args, **kwargs)

                return call

            for name in ("fsync", "rename", "replace", "unlink"):
                setattr(writer_file.os, name, counted(name, getattr(os, name)))
            write_seven(out)

        status = in_child(killed)
        assert status in (0, 9)
        if out.exists():
            assert Shards(out).fingerprint == expected  # whole, or not there
        assert write_seven(out) == expected
        assert verify(out) == []
        assert not list(tmp_path.glob(f".out{step}.partial"))
        for path in (tmp_path / "undisturbed").iterdir():
            assert path.read_bytes() == (out / path.name).read_bytes()
        if status == 0:
            break
        step += 1
    assert step > 20  # the sweep did sweep


def test_a_second_writer_and_another_plan_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    with SetWriter(out, {"a": 0}, shard_size=2) as writer:  # stops before its first shard is whole
        writer.write(1, np.zeros((1, 2, 2), np.uint8), None)
    with SetWriter(out, {"a": 1}, shard_size=1) as writer:
        writer.write(1, np.zeros((1, 2, 2), np.uint8), None)
        with pytest.raises(DataError, match="another process is writing"):
            SetWriter(out, {"a": 1}, shard_size=1).__enter__()
    with pytest.raises(DataError, match="interrupted run with other images or settings"):
        SetWriter(out, {"a": 2}, shard_size=1).__enter__()
    with SetWriter(out, {"a": 1}, shard_size=1) as writer:
        assert writer.position == 1
        writer.finish()
    with pytest.raises(DataError, match="is not empty and is not the same set"):
        SetWriter(out, {"a": 2}, shard_size=1).__enter__()
    old = tmp_path / ".old.partial"
    old.mkdir()
    (old / "progress.json").write_text("{}")  # as the first version noted its shards
    with pytest.raises(DataError, match="interrupted run of an earlier version; remove it"):
        SetWriter(tmp_path / "old", {}, shard_size=1).__enter__()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is not empty"):
        SetWriter(tmp_path / "file", {}, shard_size=1).__enter__()
    with pytest.raises(DataError, match="cannot be written"):
        SetWriter(tmp_path / "file" / "set", {}, shard_size=1).__enter__()
