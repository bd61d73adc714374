"""`encode --arrays`: what is given is stored, a killed run goes on, and mistakes are found before work begins."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speed_engine.__main__ import main
from speed_engine.data import DataError, encode_arrays
from speed_engine.data.shards import Shards
from speed_engine.data.storage.index import verify

NUM = 30
X = np.random.default_rng(0).normal(size=(NUM, 4, 3, 5, 5)).astype(np.float16)  # a video each
GIVEN: dict[str, np.ndarray] = {
    "x": X,
    "label": np.arange(NUM) % 3,
    "class_names": np.array(["cat", "dog", "owl"]),
    "vector": np.random.default_rng(1).normal(size=(NUM, 2)).astype(np.float32),
    "tokens": np.arange(NUM * 6, dtype=np.int32).reshape(NUM, 3, 2),
    "frames": np.arange(NUM),
}


def command(*words: object) -> int:
    """`python -m speed_engine WORDS`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["speed_engine", *map(str, words)])
        return main()


def save(path: Path, **changes: Any) -> Path:
    """GIVEN with changes (None: left out) as an .npz file."""
    np.savez(path, **{k: v for k, v in (GIVEN | changes).items() if v is not None})
    return path


def test_what_is_stored_is_what_was_given(tmp_path: Path) -> None:
    out = tmp_path / "set"
    words = ["encode", "--arrays", save(tmp_path / "a.npz"), "--out", out, "--shard-size", 7]
    words += ["--scale", "1,2,0.5,4", "--shift=-1,0,2,3", "--vae", "somebody/vae"]
    assert command(*words) == 0
    source = Shards(out, check_scale=False)
    facts = source.facts
    assert facts.shape == X.shape[1:] and facts.space.vae == "somebody/vae"
    assert facts.space.scale == (1.0, 2.0, 0.5, 4.0) and facts.space.shift == (-1.0, 0.0, 2.0, 3.0)
    assert {name: each.kind for name, each in facts.conditions.items()} == {
        "label": "label",
        "vector": "vector",
        "tokens": "tokens",
        "frames": "frames",
    }
    order = [29, 0, 13, 13]
    stored, told = source.read(order)
    assert np.array_equal(stored.numpy(), X[order])
    for name in ("label", "vector", "tokens", "frames"):
        assert np.array_equal(told[name].numpy(), GIVEN[name][order]), name
    x = source.decode(stored).numpy()
    for channel in range(4):
        wanted = X[order, channel].astype(np.float32) - facts.space.shift[channel]
        np.testing.assert_allclose(x[:, channel], wanted * facts.space.scale[channel], rtol=1e-6)
    before = json.loads((out / "index.json").read_text())
    assert command("encode", "--reindex", out) == 0
    assert json.loads((out / "index.json").read_text()) == before


def test_means_and_deviations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = np.concatenate([X, np.abs(X) / 4], 1)
    given = save(tmp_path / "a.npz", x=both)
    words = ["encode", "--arrays", given, "--out", tmp_path / "set", "--scale", 1, "--posterior"]
    assert command(*words) == 0
    source = Shards(tmp_path / "set")
    assert source.facts.space.posterior and source.facts.shape == X.shape[1:]
    assert np.array_equal(source.read([3])[0].numpy(), both[[3]])
    save(given, x=X[:, :3])
    assert command(*words[:4], tmp_path / "odd", *words[5:]) == 2
    assert "3 channels, which are not two halves" in capsys.readouterr().err


SLOW = """
import sys, time
from speed_engine.__main__ import main
from speed_engine.data.storage.shard_writer import ShardWriter
real = ShardWriter.write
def slow(*args, **kwargs):
    time.sleep(0.02)
    return real(*args, **kwargs)
ShardWriter.write = slow
sys.exit(main())
"""


@pytest.mark.parametrize("how", ["npz", "folder"])
def test_kill_9_in_the_middle_then_the_same_command(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    if how == "npz":
        given = save(tmp_path / "given.npz")
    else:
        given.mkdir()
        for name, array in GIVEN.items():
            np.save(given / f"{name}.npy", array)
    words = ["encode", "--arrays", given, "--scale", "1", "--shard-size", "4"]
    assert command(*words, "--out", tmp_path / "expected") == 0
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    words = [str(word) for word in [*words, "--out", out]]
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", SLOW, *words])
    while process.poll() is None and not list(partial.glob("shard-000002.tar")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    capsys.readouterr()
    assert command(*words) == 0
    assert "continuing after " in capsys.readouterr().err
    assert verify(out) == [] and not partial.exists()
    for path in (tmp_path / "expected").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert command(*words) == 0
    assert f"already there: {NUM} samples" in capsys.readouterr().err


def test_other_arrays_are_not_the_same_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["encode", "--arrays", save(tmp_path / "a.npz"), "--out", tmp_path / "set"]
    assert command(*words, "--scale", 1) == 0
    for name in ("x", "label", "vector", "class_names"):
        other = GIVEN[name].copy()
        other[1] = other[0]
        save(tmp_path / "a.npz", **{name: other})
        assert command(*words, "--scale", 1) == 2, name
        assert "is not the same set" in capsys.readouterr().err


def nan(array: np.ndarray) -> np.ndarray:
    """The array with a NaN in sample 17."""
    bad = array.copy()
    bad[17].flat[-1] = np.nan
    return bad


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "scales": ({}, ["--scale", "1,2"], "2 numbers for 4 channels"),
    "no scale": ({}, [], "give --scale"),
    "negative scale": ({}, ["--scale=-1"], "above 0"),
    "shifts": ({}, ["--scale", "1", "--shift", "1,2"], "--shift has 2 numbers for 4"),
    "auto shift": ({}, ["--scale", "1", "--shift", "auto"], "leave out --shift"),
    "auto and shift": ({}, ["--scale", "auto", "--shift", "1"], "leave out --shift"),
    "pixels": ({"x": X.astype(np.uint8)}, ["--scale", "1"], "x is uint8"),
    "pixels' vae": ({"x": X.astype(np.uint8)}, ["--vae", "a"], "x is uint8"),
    "nan": ({"x": nan(X)}, ["--scale", "1"], "sample 17: x holds NaN"),
    "vector nan": ({"vector": nan(GIVEN["vector"])}, ["--scale", "1"], "sample 17: vector holds"),
    "label below": ({"label": np.arange(NUM) - 1}, ["--scale", "1"], "sample 0: the label -1"),
    "label above": ({"label": np.arange(NUM)}, ["--scale", "1"], "sample 3: the label 3 is not"),
    "names alone": ({"label": None}, ["--scale", "1"], "with a label beside it"),
    "names": ({"class_names": np.arange(3)}, ["--scale", "1"], "must be a row of texts"),
    "one name": ({"class_names": np.array("cat")}, ["--scale", "1"], "must be a row of texts"),
    "empty": ({"vector": np.zeros((NUM, 0))}, ["--scale", "1"], "not empty"),
    "name": ({"class": np.arange(NUM)}, ["--scale", "1"], "'class' cannot be an array's name"),
    "taken": ({"flipped": np.arange(NUM)}, ["--scale", "1"], "the name 'flipped' is taken"),
    "big-endian": ({"vector": np.zeros((NUM, 2), ">f4")}, ["--scale", "1"], "vector is >f4"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the corrected command does not find another run's beginnings in its way."""
    changes, words, reason = MISTAKES[name]
    given = save(tmp_path / "a.npz", **changes)
    common = ["encode", "--arrays", given, "--out", tmp_path / "set", "--shard-size", 2]
    assert command(*common, *words) == 2
    said = capsys.readouterr().err.strip()
    assert reason in said and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    save(given)
    assert command(*common, "--scale", 1) == 0


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["objects", "folder", "pickle", "text", "npy", "cut", "bit", "zip"])
def test_files_that_are_no_arrays(tmp_path: Path, how: str) -> None:
    trap = np.array([Trap(tmp_path / "sprung")] * NUM, object)
    given = save(tmp_path / "a.npz", **({"trap": trap} if how == "objects" else {}))
    content = given.read_bytes()
    if how == "folder":
        given = tmp_path / "folder"
        given.mkdir()
        np.save(given / "x.npy", trap, allow_pickle=True)
    elif how == "pickle":
        given.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    elif how == "text":
        given.write_text("no archive")
    elif how == "cut":
        given.write_bytes(content[:-100])
    elif how == "bit":
        given.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif how == "npy":
        given = tmp_path / "x.npy"
        np.save(given, X)
    elif how == "zip":
        import zipfile

        with zipfile.ZipFile(given, "w") as archive:
            archive.writestr("notes.txt", "no array")
    with pytest.raises(DataError, match=r"cannot be read as arrays|is one array|is no \.npz file"):
        encode_arrays.encode_arrays(given, tmp_path / "set", scale=1.0)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "set").exists()


def test_a_folder_is_read_piece_by_piece(tmp_path: Path) -> None:
    """Samples that are larger together than what is looked at in one piece."""
    given = tmp_path / "given"
    given.mkdir()
    shape = (40, 1, 1024, 1024)  # 40 MiB, of which one piece holds 16
    x = np.lib.format.open_memmap(given / "x.npy", mode="w+", dtype=np.uint8, shape=shape)
    x[:, :, 0, 0] = np.arange(40)[:, None]
    x.flush()
    whole = encode_arrays.open_arrays(given)["x"]
    assert isinstance(whole, np.memmap)
    one = encode_arrays.digest(given, "x", whole)
    x[39, 0, 1023, 1023] = 1
    x.flush()
    assert one != encode_arrays.digest(given, "x", encode_arrays.open_arrays(given)["x"])
    del x, whole
    encode_arrays.encode_arrays(given, tmp_path / "set", shard_size=16)
    stored, _ = Shards(tmp_path / "set").read([39, 5])
    assert stored[:, 0, 0, 0].tolist() == [39, 5] and int(stored[0, 0, -1, -1]) == 1
    os.remove(given / "x.npy")
