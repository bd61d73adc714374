"""Tars of others: what does not belong into a shard is refused with its place, never read around."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from speed_engine.data import DataError
from speed_engine.data.shards import Shards
from speed_engine.data.storage.index import reindex, verify
from speed_engine.data.storage.writer import SetWriter


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


GOOD = npy(np.zeros((1, 4, 4), np.uint8))
VECTOR = npy(np.ones(3, np.float32))
LATENT = np.zeros((4, 2, 2), np.float16)


def member(name: str, body: bytes = GOOD, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, body


def nan() -> np.ndarray:
    array = LATENT.copy()
    array[1, 1, 0] = np.nan
    return array


LONG = "a" * 120
# What follows a good sample 0, and what the sentence must say.
WRONG: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "absolute": ([member("/1.npy")], "not allowed"),
    "upward": ([member("../1.npy")], "not allowed"),
    "upward inside": ([member("a/../1.npy")], "not allowed"),
    "empty": ([member("")], "not allowed"),
    "dot inside": ([member("a/./1.npy")], "not allowed"),
    "hidden": ([member(".npy")], "not allowed"),
    "blank": ([member("1 2.npy")], "not allowed"),
    "no ending": ([member("1")], "not allowed"),
    "non-ascii": ([member("é.npy")], "not allowed"),
    "nul": ([member("1\0x.npy")], "after a NUL"),
    "too long": ([member(f"{LONG}{LONG}{LONG}.npy")], "not allowed"),
    "long and upward": ([member(f"{LONG}/../1.npy")], "not allowed"),
    "pickle": ([member("1.npy"), member("1.pkl")], "'1.pkl' is not allowed"),
    "pyd": ([member("1.npy"), member("1.pyd")], "not allowed"),
    "pth": ([member("1.pth")], "not allowed"),
    "pipe": ([member("pipe:touch.npy")], "not allowed"),
    "array twice": ([member("1.npy"), *[member("1.vector.npy", VECTOR)] * 2], "comes twice"),
    "array taken": ([member("1.npy"), member("1.label.npy", VECTOR)], "'label' is taken"),
    "array x": ([member("1.npy"), member("1.x.npy", VECTOR)], "'x' is taken"),
    "array keyword": ([member("1.npy"), member("1.class.npy", VECTOR)], "'class' cannot be"),
    "array name": ([member("1.npy"), member("1.Vec.npy", VECTOR)], "'Vec' cannot be"),
    "array below": ([member("1.npy"), member("1.vector.x.npy", VECTOR)], "not allowed"),
    "array on some": ([member("1.npy"), member("1.vector.npy", VECTOR)], "some do not"),
    "duplicate member": ([member("0.npy")], "'0.npy' comes twice"),
    "apart": ([member("1.cls", b"1"), member("1.npy"), member("0.npy")], "'0' comes twice"),
    "symbolic link": ([member("1.npy", b"", type=b"2", linkname="/etc/passwd")], "symbolic link"),
    "hard link": ([member("1.npy", b"", type=b"1", linkname="0.npy")], "a hard link"),
    "device": ([member("1.npy", b"", type=b"3")], "character device"),
    "fifo": ([member("1.npy", b"", type=b"6")], "a pipe"),
    "directory": ([member("d", b"1234", type=b"5")], "the folder 'd/' has"),
    "sparse": ([member("1.npy", type=b"S")], "a sparse file"),
    "unknown type": ([member("1.npy", type=b"Z")], "only regular files"),
    "pax size": ([member("1.npy", pax_headers={"size": "4"})], "overrides b'size'"),
    "pax path": ([member("1.npy", pax_headers={"path": "/x.npy"})], "'/x.npy' is not allowed"),
    "no array": ([member("1.cls", b"3")], "has no .npy member"),
    "not an array": ([member("1.npy", b"\x80\x04pickle")], "not a npy file"),
    "object array": ([member("1.npy", npy(np.array([[[None]]])))], "dtype '|O'"),
    "other shape": (
        [member("1.npy", npy(np.zeros((1, 4, 5), np.uint8)))],
        "the first of the shard",
    ),
    "two sides": ([member("1.npy", npy(np.zeros((4, 4), np.uint8)))], "but the first"),
    "other dtype": ([member("1.npy", npy(np.zeros((1, 4, 4), np.float16)))], "the first of the sh"),
    "double": ([member("1.npy", npy(np.zeros((1, 4, 4))))], "dtype '<f8'"),
    "big-endian": ([member("1.npy", npy(np.zeros((1, 4, 4), ">f2")))], "dtype '>f2'"),
    "fortran": ([member("1.npy", npy(np.zeros((2, 4, 4), np.uint8, "F")))], "Fortran"),
    "empty shape": ([member("1.npy", npy(np.zeros((1, 0, 4), np.uint8)))], "empty shape"),
    "short array": ([member("1.npy", GOOD[:-1])], "does not fit its shape"),
    "long array": ([member("1.npy", GOOD + b"\0")], "does not fit its shape"),
    "label negative": ([member("1.npy"), member("1.cls", b"-1")], "label -1 is out of range"),
    "label float": ([member("1.npy"), member("1.cls", b"3.0")], "not an integer"),
    "label empty": ([member("1.npy"), member("1.cls", b"")], "not an integer"),
    "label text": ([member("1.npy"), member("1.cls", b"cat")], "not an integer"),
    "label huge": ([member("1.npy"), member("1.cls", b"9999999999")], "out of range"),
    "label twice": ([member("1.npy"), member("1.cls", b"1"), member("1.cls", b"2")], "comes twice"),
    "label missing": ([member("1.npy")], "some do not"),
    "flipped on some": ([member("1.npy"), member("1.flipped.npy")], "some do not"),
}


def tar_of(parts: list[tuple[tarfile.TarInfo, bytes]], path: Path, form: int) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for info, body in parts:
            tar.addfile(info, io.BytesIO(body) if body else None)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_members_are_refused_with_their_place(tmp_path: Path, case: str) -> None:
    parts, reason = WRONG[case]
    form = tarfile.PAX_FORMAT if any(info.pax_headers for info, _ in parts) else tarfile.GNU_FORMAT
    first = [member("0.cls", b"1"), member("0.npy")]
    if case == "fortran":
        first = [member("0.npy", npy(np.zeros((2, 4, 4), np.uint8)))]
    path = tmp_path / "set" / "some.tar"
    path.parent.mkdir()
    tar_of([*first, *parts], path, form)
    with pytest.raises(DataError) as caught:
        reindex(path.parent)
    number = {"duplicate member": 0, "apart": 2}.get(case, 1)
    assert re.search(rf"^some\.tar, sample {number}: .*{re.escape(reason)}", str(caught.value))
    assert [entry.name for entry in path.parent.iterdir()] == ["some.tar"]  # nothing written


def test_what_tar_and_webdataset_write_is_read(tmp_path: Path) -> None:
    """`./` before names, entries of folders, a global PAX header, long names of both kinds, CRLF behind a label."""
    parts = [member("./", b"", type=b"5"), member("./0.cls", b"1\r\n"), member("./0.npy")]
    parts += [member("d", b"", type=b"5"), member("d/1.npy"), member("d/1.cls", b"0")]
    parts += [member(f"{LONG}.cls", b"2\n"), member(f"{LONG}.npy")]
    for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        (tmp_path / name).mkdir()
        headers = {"comment": "by somebody"} if name == "pax" else None
        with tarfile.open(tmp_path / name / "a.tar", "w", format=form, pax_headers=headers) as tar:
            for info, body in parts:
                tar.addfile(info, io.BytesIO(body) if body else None)
        index = reindex(tmp_path / name)
        assert (index.count, index.num_classes) == (3, 3)
        assert not verify(tmp_path / name)
        source = Shards(tmp_path / name)
        stored, told = source.read([0, 1, 2])
        assert told["label"].tolist() == [1, 0, 2] and not stored.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latents_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    bad = LATENT.copy()
    bad[1, 1, 0] = value
    tar_of([member("0.npy", npy(LATENT)), member("1.npy", npy(bad))], tmp_path / "a.tar", 0)
    with pytest.raises(DataError, match=r"a\.tar, sample 1: its array holds NaN or infinity"):
        reindex(tmp_path, scale=1.0)
    with (
        SetWriter(tmp_path / "out", {}, shard_size=2) as writer,
        pytest.raises(DataError, match=r"shard-000000\.tar, sample 1: .*NaN"),
    ):
        writer.write(1, LATENT, None)
        writer.write(2, bad, None)


def test_posteriors_that_cannot_be_are_refused(tmp_path: Path) -> None:
    negative = LATENT.copy()
    negative[3] = -1
    tar_of([member("0.npy", npy(negative))], tmp_path / "a.tar", 0)
    with pytest.raises(DataError, match="sample 0: its array holds a negative standard deviation"):
        reindex(tmp_path, scale=1.0, posterior=True)
    tar_of([member("0.npy")], tmp_path / "a.tar", 0)
    with pytest.raises(DataError, match="cannot be mean and standard deviation"):
        reindex(tmp_path, posterior=True)


def test_a_size_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    info, _ = member("0.npy")
    info.size = 1 << 33
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(DataError, match=r"sample 0: .*size.*is not an octal number"):
        reindex(tmp_path)
    info.size = 1 << 30
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(DataError, match=r"sample 0: .*larger than the limit"):
        reindex(tmp_path)


def test_shards_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    def pair(second: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        tar_of([member("0.npy"), member("0.cls", b"0")], tmp_path / "a.tar", 0)
        tar_of(second, tmp_path / "b.tar", 0)

    pair([member("0.npy", npy(np.zeros((1, 4, 5), np.uint8))), member("0.cls", b"0")])
    with pytest.raises(DataError, match=r"b\.tar has stored_shape .* but a\.tar"):
        reindex(tmp_path)
    pair([member("0.npy")])
    with pytest.raises(DataError, match=r"a\.tar and b\.tar has labels"):
        reindex(tmp_path)
    pair([])
    with pytest.raises(DataError, match=r"b\.tar holds no sample"):
        reindex(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.tar is empty"):
        reindex(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(DataError, match=r"b\.tar, sample 0: "):
        reindex(tmp_path)
