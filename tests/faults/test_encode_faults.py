"""Bad images, empty folders, a full disk and kill -9: `encode` lists, explains and continues."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from speed_engine.commands.encode import add_arguments, run
from speed_engine.data import DataError
from speed_engine.data.encode import encode
from speed_engine.data.shards import Shards
from speed_engine.data.storage import pictures
from speed_engine.data.storage import writer as writer_file
from speed_engine.data.storage.index import verify
from speed_engine.errors import told_in_one_sentence


def noise(side: int = 16, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(side)
    return rng.integers(0, 256, (side, side, channels), dtype=np.uint8).squeeze()


def good_images(root: Path, num: int) -> Path:
    root.mkdir(parents=True)
    for i in range(num):
        Image.fromarray(np.roll(noise(), i, 0)).save(root / f"good{i:03d}.png")
    return root


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_bad_images_are_listed_with_reasons(tmp_path: Path) -> None:
    images = good_images(tmp_path / "images", 3)
    Image.fromarray(noise(64)).save(images / "whole.jpg", quality=95)
    (images / "truncated.jpg").write_bytes((images / "whole.jpg").read_bytes()[:900])
    Image.fromarray(noise(1).reshape(1, 1, 3)).save(images / "one.png")
    (images / "bomb.png").write_bytes(bomb(30_000, 30_000))
    (images / "smaller_bomb.png").write_bytes(bomb(11_000, 11_000))
    (images / "empty.png").write_bytes(b"")
    (images / "text.jpg").write_text("this is no image")
    (images / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (images / "pickle.png").write_bytes(b"\x80\x04\x95")
    Image.fromarray(noise(16, 1).astype(np.float32)).save(images / "float.tiff")
    index = encode(images, tmp_path / "out", size=16)
    listed = {
        item["file"]: item["reason"]
        for item in json.loads((tmp_path / "out" / "skipped.json").read_text())
    }
    assert index.count == 4
    assert set(listed) == {
        "truncated.jpg",
        "one.png",
        "bomb.png",
        "smaller_bomb.png",
        "empty.png",
        "text.jpg",
        "script.png",
        "pickle.png",
        "float.tiff",
    }
    assert "truncated" in listed["truncated.jpg"]
    assert "too small (1 x 1)" in listed["one.png"]
    assert "bomb" in listed["bomb.png"]
    assert "121000000 pixels" in listed["smaller_bomb.png"].replace("11000 x 11000", "121000000")
    assert "cannot identify image file" in listed["text.jpg"]
    assert str(tmp_path) not in json.dumps(listed)  # no path of this machine
    with pytest.raises(DataError, match=r"bomb\.png: cannot be decoded"):
        encode(images, tmp_path / "strict", size=16, strict=True)


def test_unusual_images_are_understood(tmp_path: Path) -> None:
    colour = np.full((8, 8, 3), [200, 100, 50], np.uint8)

    def decoded(name: str, channels: int = 3) -> np.ndarray:
        return pictures.decode(tmp_path / name, 8, channels, 1)

    def all_of(array: np.ndarray, *values: int) -> bool:
        return bool((abs(array.astype(int) - np.array(values).reshape(-1, 1, 1)) <= 3).all())

    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert all_of(decoded("cmyk.jpg"), 200, 100, 50)
    Image.fromarray(np.full((8, 8), 200 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert all_of(decoded("deep.png"), 200, 200, 200)  # scaled, not clipped to white
    assert all_of(decoded("deep.png", 1), 200)
    clear = np.dstack([colour, np.zeros((8, 8), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert all_of(decoded("clear.png"), 255, 255, 255)
    Image.fromarray(colour).quantize(4).save(tmp_path / "palette.png")
    assert all_of(decoded("palette.png"), 200, 100, 50)
    Image.fromarray(colour).save(tmp_path / "png.jpg", format="PNG")  # wrong ending, good content
    assert all_of(decoded("png.jpg"), 200, 100, 50)
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1").save(tmp_path / "bits.png")
    assert (decoded("bits.png", 1)[0] == np.eye(8) * 255).all()


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 3), np.uint8)
    values[:4] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(values).save(tmp_path / "a.jpg", quality=100, exif=exif)
    array = pictures.decode(tmp_path / "a.jpg", 8, 1, 1)[0]
    assert (array[:, 4:] > 250).all() and (array[:, :4] < 5).all()  # white on the right


def test_hostile_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for ending, settings in (("png", {}), ("jpg", {"quality": 90}), ("webp", {}), ("gif", {})):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(noise(24)).save(path, **settings)
        whole = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(whole[: int(rng.integers(1, len(whole) + 1))])
            for position in rng.integers(0, len(damaged), 4).tolist():
                damaged[position] = int(rng.integers(256))
            path.write_bytes(damaged)
            try:
                assert pictures.decode(path, 8, 3, 1).shape == (3, 8, 8)
            except pictures.PictureError as error:
                assert str(tmp_path) not in str(error)


def test_empty_and_mixed_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        encode(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="nothing is not a folder"):
        encode(tmp_path / "nothing", tmp_path / "out")
    mixed = good_images(tmp_path / "mixed", 1)
    good_images(mixed / "class", 1)
    with pytest.raises(DataError, match="both beside and inside its sub-folders"):
        encode(mixed, tmp_path / "out")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no image to write; skipped 1, the first: a\.png: cannot"):
        encode(bad, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.lock",
        "bad",
        "empty",
        "mixed",
    ]


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = good_images(tmp_path / "images", 5)
    expected = encode(images, tmp_path / "expected", size=8, shard_size=2).fingerprint
    real, left = os.fsync, 4

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--images", str(images), "--out", str(tmp_path / "out"), "--size", "8"]
    args = parser.parse_args([*words, "--shard-size", "2"])
    with monkeypatch.context() as patch:
        patch.setattr(writer_file.os, "fsync", full)
        assert told_in_one_sentence(lambda: run(args)) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert run(args) == 0
    assert Shards(tmp_path / "out").fingerprint == expected


SLOW = """
import sys, time
from speed_engine.data.storage import pictures
from speed_engine.data.encode import encode
real = pictures.decode
def slow(*args):
    time.sleep(0.02)
    return real(*args)
pictures.decode = slow
encode(sys.argv[1], sys.argv[2], size=8, shard_size=4)
"""


def test_kill_9_in_the_middle_then_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = good_images(tmp_path / "images", 150)
    for i in range(0, 150, 7):  # skipped ones must not be lost or listed twice either
        (images / f"good{i:03d}_bad.png").write_bytes(b"bad")
    expected = encode(images, tmp_path / "expected", size=8, shard_size=4)
    out = tmp_path / "out"
    partial = tmp_path / ".out.partial"
    command = [sys.executable, "-W", "ignore", "-c", SLOW, str(images), str(out)]
    process = subprocess.Popen(command)
    while process.poll() is None and not list(partial.glob("shard-000002.tar")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert partial.is_dir() and not out.exists()
    decoded = 0
    real = pictures.decode

    def counted(*args: object) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        return real(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(pictures, "decode", counted)
    index = encode(images, out, size=8, shard_size=4)
    assert index.fingerprint == expected.fingerprint and verify(out) == []
    assert decoded < 172  # continued, not repeated
    assert not partial.exists()
    for path in (tmp_path / "expected").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
