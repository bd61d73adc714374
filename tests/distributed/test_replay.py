"""`train.replay_every` among two processes: the one that computed wrongly is named, and both end with the code."""

from pathlib import Path

import pytest
import torch

from speed_engine import config as configuration
from speed_engine.distributed import Processes
from speed_engine.training import assembly

TRAIN = Path(__file__).resolve().parents[2] / "speed_engine" / "train.py"

# train.py in which one bit of one number of one gradient flips in the fourth pass forward of one process.
ERRING = """
import itertools, os, runpy, torch
from speed_engine.engines.deepspeed import DeepSpeedEngine as Engine
forward, calls = Engine.forward, itertools.count(1)
def flip(gradient):
    bits = gradient.clone().view(torch.int32)
    bits.view(-1)[5] ^= 1 << 18
    return bits.view(torch.float32)
def erring(self, x, time_B, **conditions):
    out = forward(self, x, time_B, **conditions)
    if next(calls) == 4 and os.environ["RANK"] == "1":
        out.register_hook(flip)
    return out
Engine.forward = erring
runpy.run_path({train!r}, run_name="__main__")
"""


def test_the_process_that_errs_is_named(launcher):
    script = launcher.folder / "erring.py"
    script.write_text(ERRING.format(train=str(TRAIN)))
    settings = ("engine.zero=2", "train.steps=8", "checkpoint.every=3", "train.replay_every=2")
    arguments = launcher.arguments("run", *settings)
    output = launcher.wait(launcher.start(2, arguments, program=script), expect=5)
    assert output.count("is not the same bits") == 1 and "Traceback" not in output, output
    assert "error (process 1): the gradient of step 3, computed again on process 1" in output
    folders = (launcher.folder / "run" / "checkpoints").glob("step-*")
    assert [folder.name for folder in folders] == ["step-00000003"]


def test_what_cannot_be_computed_twice_is_refused(tmp_path):
    settings = [f"data.path={tmp_path}", "engine.zero=3", "train.replay_every=2", "model.depth=1"]
    config = configuration.load("digits_dit_tiny", settings)
    parts = assembly.build(config, Processes(0, 1, 0, torch.device("cpu")))

    class Zero3:
        def alone(self) -> None: ...

    with pytest.raises(ValueError, match=r"engine\.zero to 2 or less"):
        assembly.open_step(parts, Zero3())  # pyright: ignore[reportArgumentType]
