"""Methods that learn their table, on two processes, resumed by as many and by another number."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed.test_training import assert_equal, checkpoint

COMMON = ("engine.zero=1", "model.depth=1", "checkpoint.every=20", "checkpoint.keep=9")
MUST = "checkpoint.resume=must"
# So that each learns often within 60 steps.
INFONOISE = ("timesteps.kind=infonoise", "timesteps.warmup_steps=10", "timesteps.every=5")
ADAPTIVE = (
    "timesteps.kind=adaptive",
    "timesteps.every=5",
    "timesteps.sweep_every=10",
    "timesteps.sweep_rows=20",
    "timesteps.num_sweeps=3",
)


def learned(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(run, step) / "timesteps.safetensors")


def test_infonoise_goes_on_elsewhere(launcher):
    """Two processes, then one, then two: counts are exact; what is learned from losses is, to their sums' rounding."""
    launcher.train("two", *INFONOISE, *COMMON, "train.steps=60", world=2)
    two, moved = launcher.folder / "two", launcher.folder / "moved"
    shutil.copytree(two, moved)
    for later in (40, 60):
        shutil.rmtree(checkpoint(moved, later))
    for step, world in ((40, 1), (60, 2)):
        launcher.train("moved", *INFONOISE, *COMMON, f"train.steps={step}", MUST, world=world)
        expected, found = learned(two, step), learned(moved, step)
        before = learned(two, 20)["density.0"]
        assert not torch.equal(expected["density.0"], before), "it learned nothing"
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if key.endswith("count") or key == "observations":
                assert torch.equal(value, found[key]), key
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_adaptive_goes_on_where_it_was(launcher):
    """The same bits on the same number of processes alone: its rewards are differences of nearly equal losses, in which
    the rounding of their sums shows, and decides. The engine compares the tables of both when it saves."""
    launcher.train("two", *ADAPTIVE, *COMMON, "train.steps=60", world=2)
    two, resumed = launcher.folder / "two", launcher.folder / "resumed"
    shutil.copytree(two, resumed)
    shutil.rmtree(checkpoint(resumed, 60))
    launcher.train("resumed", *ADAPTIVE, *COMMON, "train.steps=60", MUST, world=2)
    assert not torch.equal(learned(two, 60)["density.0"], learned(two, 40)["density.0"])
    assert_equal(learned(two, 60), learned(resumed, 60))
