"""Checkpoints are whole or absent."""

import json
import os

import pytest
import torch

from speed_engine import atomic_files
from speed_engine.distributed import Processes
from speed_engine.training import checkpoint, rollback
from speed_engine.training.checkpoint import CheckpointError

ALONE = Processes(0, 1, 0, torch.device("cpu"))


def write(folder):
    (folder / "state").mkdir()
    (folder / "state" / "a.bin").write_bytes(os.urandom(5000))
    for name in ("model", "ema"):
        (folder / f"{name}.safetensors").write_bytes(b"weights")


def save(run, step, keep=2, write=write):
    return checkpoint.save(run, step, ALONE, write, {"config": {"seed": 1}}, keep)


def find(run):
    said = []
    return checkpoint.newest(run, said.append), said


def test_the_newest_is_found_and_old_ones_go(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    found, said = find(tmp_path)
    assert found.step == 30 and found.manifest["config"] == {"seed": 1} and not said
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000020", "step-00000030"]


def test_an_empty_run_has_none(tmp_path):
    assert find(tmp_path) == (None, [])


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "no manifest"])
def test_damage_is_named_and_passed_over(tmp_path, damage):
    save(tmp_path, 10)
    folder = save(tmp_path, 20)
    victim = folder / "state" / "a.bin"
    content = victim.read_bytes()
    if damage == "truncate":
        victim.write_bytes(content[:-1])
    elif damage == "flip":
        victim.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "delete":
        victim.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").unlink()
    found, said = find(tmp_path)
    assert found.step == 10
    assert len(said) == 1 and "step-00000020" in said[0]
    with pytest.raises(CheckpointError, match="step-00000020"):
        checkpoint.verified(folder)


def test_only_damaged_ones_are_an_error(tmp_path):
    folder = save(tmp_path, 20)
    (folder / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match="usable"):
        find(tmp_path)


def test_a_failed_save_leaves_the_old_one(tmp_path):
    save(tmp_path, 10)

    def full(folder):
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path, 20, write=full)
    assert find(tmp_path)[0].step == 10
    save(tmp_path, 20)  # the partial folder is not in the way
    assert find(tmp_path)[0].step == 20


class Killed(BaseException):
    """Stands for kill -9: nothing in our code catches it."""


def dying(function, number):
    """`function`, which dies instead of running the `number`-th time."""
    calls = iter(range(1_000_000))

    def call(*args, **kwargs):
        if next(calls) == number:
            raise Killed
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("moment", "number", "survivor"),
    [
        ("sync", 0, 10),  # the first data file is not durable yet
        ("sync", 1, 10),
        ("write_json", 0, 10),  # no manifest
        ("sync", 3, 10),  # manifest written, folder not renamed
        ("sync", 5, 20),  # renamed: committed
        ("write_text", 0, 20),  # only `latest` is missing, which nothing reads
    ],
)
def test_death_between_any_two_steps_of_the_commit(tmp_path, monkeypatch, moment, number, survivor):
    save(tmp_path, 10)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, moment, dying(getattr(checkpoint, moment), number))
        save(tmp_path, 20)
    assert find(tmp_path)[0].step == survivor
    save(tmp_path, 30)
    assert find(tmp_path)[0].step == 30


def test_latest_is_never_followed(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "checkpoints" / "latest").write_text("../../etc")
    assert find(tmp_path)[0].step == 10


def test_written_json_is_whole(tmp_path):
    path = tmp_path / "x.json"
    atomic_files.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_after_going_back_latest_names_what_is_there(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=9)
    found = rollback.target(tmp_path, [25, 26], ALONE, print)
    assert found is not None and found.step == 20
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000020"
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000010", "step-00000020"]
