"""A request to stop as a terminal or a scheduler makes it: to every process of the launcher's group at once."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_to_the_launchers_group_saves(launcher, world, number):
    """DeepSpeed's launcher hands SIGTERM on to processes that have had the signal already."""
    run = launcher.folder / "run"
    words = launcher.arguments("run", "train.steps=100000", "log.every=2", "model.depth=1")
    process = subprocess.Popen(
        [*launcher.deepspeed(world), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    journal = run / "metrics.jsonl"
    while not (journal.exists() and journal.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]  # ends when the last process has
    assert "stopped on request" in output, output
    (folder,) = (run / "checkpoints").glob("step-*")
    assert (folder / "manifest.json").is_file() and ".partial" not in folder.name
