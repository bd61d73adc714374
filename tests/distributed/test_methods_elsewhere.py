"""Methods that learn their table, resumed by another number of processes: two, then one, then two again."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_training import assert_equal, checkpoint

# So that each learns often within 60 steps, and what of its state two and one process agree on to rounding.
METHODS = {
    "infonoise": ("timesteps.warmup_steps=10", "timesteps.every=5"),
    "loss_second_moment": ("timesteps.history=1", "schedule.num_steps=40"),
    "adaptive": (
        "timesteps.every=5",
        "timesteps.sweep_every=10",
        "timesteps.sweep_rows=20",
        "timesteps.num_sweeps=3",
    ),
}


def learned(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(run, step) / "timesteps.safetensors")


@pytest.mark.parametrize("kind", METHODS)
def test_a_method_that_learns_goes_on_elsewhere(launcher, kind):
    """Counts are exact, whatever computes; what is learned from losses is, to the rounding of their sums.

    The rewards of `adaptive` are differences of nearly equal losses, in which rounding shows and which then decide: its
    density is another one by a few per cent, and the same bits only where the same number of processes goes on.
    """
    common = [f"timesteps.kind={kind}", *METHODS[kind], "engine.zero=1", "model.depth=1"]
    common += ["checkpoint.every=20", "checkpoint.keep=9"]
    launcher.train("two", *common, "train.steps=60", world=2)
    two, moved = launcher.folder / "two", launcher.folder / "moved"
    shutil.copytree(two, moved)
    if kind == "adaptive":
        shutil.copytree(two, launcher.folder / "resumed")
        shutil.rmtree(checkpoint(launcher.folder / "resumed", 60))
        launcher.train("resumed", *common, "train.steps=60", "checkpoint.resume=must", world=2)
        assert_equal(learned(two, 60), learned(launcher.folder / "resumed", 60))
    for later in (40, 60):
        shutil.rmtree(checkpoint(moved, later))
    for step, world in ((40, 1), (60, 2)):
        launcher.train(
            "moved", *common, f"train.steps={step}", "checkpoint.resume=must", world=world
        )
        expected, found = learned(two, step), learned(moved, step)
        density = expected["density.0"]
        assert not torch.equal(density, learned(two, 20)["density.0"]), "it learned nothing"
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            if key.endswith("count") or key == "observations":
                assert torch.equal(value, found[key]), key
            elif kind != "adaptive":
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
        apart = float((found["density.0"] - density).abs().max())
        assert apart < 0.2 * float(density.max()), apart
