"""A disk that refuses one of two processes: one sentence, both end, and what was saved before is whole."""

from pathlib import Path

import pytest

from speed_engine.training import checkpoint

TRAIN = Path(__file__).resolve().parents[2] / "speed_engine" / "train.py"

# train.py in which one process can write no file above 100 kB, in one function, from the saving of a step on.
LIMITED = """
import os, resource, runpy, signal
from speed_engine.training import saving
from {module} import {function} as victim
import {module} as module
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
largest = resource.getrlimit(resource.RLIMIT_FSIZE)
refuses, commit = False, saving.checkpoint.commit
def save(run, step, *rest):
    global refuses
    refuses = step in {steps} and os.environ["RANK"] == "{rank}"
    return commit(run, step, *rest)
def limited(*words, **options):
    if refuses:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, largest[1]))
    try:
        return victim(*words, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
saving.checkpoint.commit, module.{function} = save, limited
runpy.run_path({train!r}, run_name="__main__")
"""


@pytest.fixture
def refused(launcher):
    """refused(function of the victim, rank, steps, code, overrides) -> what both processes print."""

    def run(function: str, rank: int, steps: tuple, code: int, *overrides: str) -> str:
        module, _, name = function.rpartition(".")
        script = launcher.folder / "limited.py"
        words = {"module": module, "function": name, "rank": rank, "steps": steps}
        script.write_text(LIMITED.format(train=str(TRAIN), **words))
        arguments = launcher.arguments("run", "train.steps=6", "checkpoint.every=2", *overrides)
        return launcher.wait(launcher.start(2, arguments, program=script), expect=code)

    return run


def saved(launcher) -> list[str]:
    return sorted(p.name for p in (launcher.folder / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("function", "rank", "overrides"),
    [
        ("speed_engine.engines.write", 1, ["engine.zero=1"]),
        ("speed_engine.weights.file.save", 0, ["engine.zero=3", "checkpoint.asynchronous=true"]),
    ],
)
def test_one_process_that_cannot_write_ends_all(refused, launcher, function, rank, overrides):
    output = refused(function, rank, (4, 6), 2, *overrides)
    assert output.count("cannot write the checkpoint") == 1, output
    assert "Traceback" not in output and "older checkpoints are intact" in output
    assert "step-00000004" in output
    assert saved(launcher) == ["step-00000002"]
    found = checkpoint.newest(launcher.folder / "run", print)
    assert found is not None and found.step == 2
    launcher.train("run", "train.steps=6", "checkpoint.every=2", *overrides, world=2)
    assert saved(launcher) == ["step-00000004", "step-00000006"]


def test_a_run_that_is_to_go_on_goes_on(refused, launcher):
    output = refused(
        "speed_engine.engines.write", 0, (4,), 0, "engine=torch", "checkpoint.on_error=go_on"
    )
    assert output.count("WARNING: cannot write the checkpoint") == 1, output
    assert "training goes on" in output
    assert saved(launcher) == ["step-00000002", "step-00000006"]
