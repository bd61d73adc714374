"""A request to stop as a terminal or a scheduler makes it: to every process of the launcher's group at once."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


# What the launcher does with a signal does not depend on its processes, nor what they do on the engine.
CASES = {"SIGINT": (2, ()), "SIGTERM": (1, ("engine=torch",))}


@pytest.mark.parametrize("name", CASES)
def test_a_signal_to_the_launchers_group_saves(launcher, name):
    """DeepSpeed's launcher hands SIGTERM on to processes that have had the signal already."""
    world, settings = CASES[name]
    run, number = launcher.folder / "run", signal.Signals[name]
    few = ("train.steps=100000", "log.every=2", "model.depth=1", *settings)
    words = launcher.arguments("run", *few)
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
    assert ".partial" not in folder.name
    assert json.loads((folder / "manifest.json").read_text())["processes"] == world
