"""Methods that learn their table, resumed by another number of processes: what is the same, and how far the rest is.

Two processes train to step 20, one to 40, two to 60, beside two that train all the way. What a method counts is exact,
whatever computes. What it learns from losses differs by the rounding of their sums, in which `adaptive`, whose rewards
are differences of nearly equal losses, finds another policy: it must be the same bits on as many processes alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.distributed.conftest import Launcher
from tests.distributed.test_training import checkpoint

# So that each learns often within 60 steps.
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
COMMON = ("engine.zero=1", "model.depth=1", "checkpoint.every=20", "checkpoint.keep=9")
LEFT, MOVES = 20, ((40, 1), (60, 2))  # the step of departure; then to a step, on so many processes
SAME = {"rtol": 1e-4, "atol": 1e-6}  # of what is learned from sums of losses
ALLOWED = 0.2  # of its largest, what the density of `adaptive` may differ by


def sweep(launcher: Launcher, kind: str) -> dict[str, Any]:
    """What the two runs of a method differ by at each step, and what is wrong with that."""
    words = (f"timesteps.kind={kind}", *METHODS[kind], *COMMON)
    launcher.train("two", *words, "train.steps=60", world=2)
    two, moved = launcher.folder / "two", _from(launcher, "moved", LEFT)
    steps: dict[str, dict[str, float]] = {}
    wrong: list[str] = []
    for step, world in MOVES:
        launcher.train(
            "moved", *words, f"train.steps={step}", "checkpoint.resume=must", world=world
        )
        steps[str(step)] = _apart(two, moved, step)
        wrong += [f"step {step}: {each}" for each in _wrong(two, moved, step, kind)]
    if kind == "adaptive":
        again = _from(launcher, "again", 40)
        launcher.train("again", *words, "train.steps=60", "checkpoint.resume=must", world=2)
        one, other = _learned(two, 60), _learned(again, 60)
        different = [key for key in one if not torch.equal(one[key], other[key])]
        wrong += [f"on as many processes {key} is not the same bits" for key in different]
    return {"steps": steps, "wrong": wrong}


def _from(launcher: Launcher, name: str, step: int) -> Path:
    """A copy of the run `two` as it was at a step."""
    copy = Path(shutil.copytree(launcher.folder / "two", launcher.folder / name))
    for later in range(step + 20, 61, 20):
        shutil.rmtree(checkpoint(copy, later))
    return copy


def _learned(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(run, step) / "timesteps.safetensors")


def _weights(run: Path, step: int) -> torch.Tensor:
    tensors = load_file(checkpoint(run, step) / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def _apart(two: Path, moved: Path, step: int) -> dict[str, float]:
    """Largest difference of the density, its largest value, and the weights' distance, their way since LEFT being 1."""
    one, other = (_learned(run, step)["density.0"] for run in (two, moved))
    way = (_weights(two, step) - _weights(two, LEFT)).norm()
    gap = (_weights(moved, step) - _weights(two, step)).norm()
    return {
        "density_apart": float((other - one).abs().max()),
        "density_largest": float(one.max()),
        "weights_apart": float(gap / way),
    }


def _wrong(two: Path, moved: Path, step: int, kind: str) -> list[str]:
    one, other = _learned(two, step), _learned(moved, step)
    found = []
    if torch.equal(one["density.0"], _learned(two, LEFT)["density.0"]):
        found.append("it learned nothing")
    if one.keys() != other.keys():
        return [*found, f"not the same tensors: {sorted(one.keys() ^ other.keys())}"]
    for key, value in one.items():
        if key.endswith("count") or key == "observations":
            if not torch.equal(value, other[key]):
                found.append(f"{key} is not the same")
        elif kind != "adaptive" and not torch.allclose(other[key], value, **SAME):
            found.append(f"{key} differs by more than rounding")
    apart = _apart(two, moved, step)
    if apart["density_apart"] > ALLOWED * apart["density_largest"]:
        found.append("the density is another one")
    return found
