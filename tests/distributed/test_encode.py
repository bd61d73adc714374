"""`encode` by several processes as a launcher starts them: one is killed, others continue; mistakes are told once."""

import io
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from speed_engine.data import digits
from speed_engine.data.encode import encode
from speed_engine.data.encode_set import Team
from speed_engine.data.storage.index import verify
from tests.distributed.warm import Warm

SLOW = """
import time
from speed_engine.data.storage.shard_writer import ShardWriter
real = ShardWriter.write
def slow(*args, **kwargs):
    time.sleep(0.15)
    return real(*args, **kwargs)
ShardWriter.write = slow
"""
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")


@pytest.fixture
def start(command_in):
    """start(world, words, names, before): `encode` in processes that are told their place, and of no network."""

    def ranks(world, words, names=TORCHRUN, before=""):
        places = [
            dict(zip(names, map(str, (rank, rank, world)), strict=True)) for rank in range(world)
        ]
        return [command_in(place, words, before) for place in places]

    return ranks


def ends(processes):
    """(exit code, what it said) of each."""
    said = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(120):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def test_one_is_killed_and_another_number_continues(start, tmp_path, images):
    words = ["encode", "--images", images, "--size", "8", "--shard-size", "4"]
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    processes = start(2, [*words, "--out", out, "--patience", "4"], SRUN, SLOW)
    while len(list(partial.glob("shard-*.json"))) < 4:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    (code0, said0), (code1, _) = ends(processes)
    assert (code0, code1) == (2, -signal.SIGKILL)
    assert "error: process 1 (on " in said0 and "the same command continues" in said0
    assert "30 shards, 2 processes" in " ".join(said0.split()) and "Traceback" not in said0
    done = len(list(partial.glob("shard-*.json")))
    assert not out.exists() and 4 <= done < 30
    told = io.StringIO()
    console = Console(file=told, soft_wrap=True)

    def go_on(rank):
        team = Team(rank, 3, rank, 3, "later", patience=20)
        encode(images, out, size=8, shard_size=4, team=team, console=console)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(go_on, range(3)))
    assert f"continuing after {4 * done} of 120 images" in told.getvalue()
    encode(images, tmp_path / "alone", size=8, shard_size=4)
    assert verify(out) == [] and not partial.exists()
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    # What the start with the dead one said of itself may stay behind.
    assert hidden - {".out.meeting"} == {".out.lock", ".alone.lock"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--images", "nowhere", "--out", "out", "--patience", "20"], "nowhere is not a folder"),
        (["--sighs", "8"], "unrecognized arguments: --sighs 8"),
    ],
)
def test_a_mistake_is_told_once(start, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    (code0, said0), (code1, said1) = ends(start(2, ["--local_rank=1", "encode", *words]))
    assert (code0, code1) == (2, 2) and reason in " ".join(said0.split()) and said1 == ""
    assert "Traceback" not in said0


BUILD = """
import sys
from speed_engine.data import digits
print(digits.build(digits.Config(path=sys.argv[1])).fingerprint)
"""


def test_two_processes_build_the_digits_at_once(nest, tmp_path):
    script, folder = tmp_path / "build.py", tmp_path / "data" / "digits"
    script.write_text(BUILD)
    words = [str(script), str(folder)]
    answers = ends([Warm(nest, words, env=dict(os.environ), cwd=str(tmp_path)) for _ in range(2)])
    assert [code for code, _ in answers] == [0, 0], answers
    built = digits.build(digits.Config(path=str(folder)))
    assert {said.split()[-1] for _, said in answers} == {built.fingerprint}
    assert [path.name for path in folder.parent.iterdir() if "partial" in path.name] == []
