"""Processes that find each other, or say in one sentence why they cannot: half-told places, SLURM, a taken port."""

import json
import os
import socket
from pathlib import Path

import pytest

from tests.distributed.conftest import free_port
from tests.distributed.warm import Warm

TRAIN = Path(__file__).resolve().parents[2] / "speed_engine" / "train.py"


def start(launcher, arguments: list[str], **more: str) -> Warm:
    """`train.py` with this environment, but without a word of any launcher."""
    words = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "OMPI_", "PMI_")
    bare = {k: v for k, v in os.environ.items() if not k.startswith(words)}
    place = bare | {"OMP_NUM_THREADS": "1"} | more
    return Warm(launcher.nest, [str(TRAIN), *arguments], env=place, cwd=str(Path.cwd()))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


SHORT = ("train.steps=2", "log.every=1", "model.depth=1", "engine=torch")


@pytest.mark.parametrize(
    "told",
    [
        {"WORLD_SIZE": "2"},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"},
    ],
    ids=lambda told: ",".join(told),
)
def test_a_half_told_place_trains_nothing(launcher, told):
    process = start(launcher, launcher.arguments("run", *SHORT), **told)
    text = launcher.wait([process], expect=2)
    assert "error: " in text and "Traceback" not in text
    assert not (launcher.folder / "run").exists()


def test_srun_trains_as_one_process_does(launcher):
    """A shell with a job's number alone is one process; two tasks of srun share each batch."""
    launcher.wait(
        [start(launcher, launcher.arguments("one", *SHORT), SLURM_JOB_ID="7", SLURM_NTASKS="2")]
    )
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SLURM_NTASKS": "2"}
    tasks = [
        start(
            launcher,
            launcher.arguments("two", *SHORT),
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            **meeting,
        )
        for rank in range(2)
    ]
    launcher.wait(tasks)
    assert json.loads((launcher.folder / "two" / "manifest.json").read_text())["processes"] == 2
    assert losses(launcher.folder / "two") == pytest.approx(
        losses(launcher.folder / "one"), rel=1e-6
    )


def test_a_taken_port_is_named_with_the_cure(launcher):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        process = start(launcher, launcher.arguments("run", *SHORT), MASTER_PORT=str(port), **place)
        text = launcher.wait([process], expect=2)
    assert f"cannot open port {port} of 127.0.0.1" in text
    assert "--master_port" in text
    assert "Traceback" not in text


def test_zero_three_trains_alone_without_a_launcher(launcher):
    """DeepSpeed looks for LOCAL_RANK in its first steps, long after its start."""
    words = [word for word in SHORT if word != "engine=torch"]
    launcher.wait([start(launcher, launcher.arguments("run", *words, "engine.zero=3"))])
    assert len(losses(launcher.folder / "run")) == 2
