"""Every sampler of the folder and one outside: what `speed_engine.sampling` promises, on every schedule."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_engine import kinds
from speed_engine.sampling.process import Process, Recipe, kept_steps, sample
from speed_engine.step_table import build_step_table

SAMPLERS = kinds.names("sampling")
SCHEDULES = kinds.names("schedule")
# Two points, unequally likely: the ideal denoiser is a sigmoid, and W1 to it is easily told.
POINTS, SHARE = (-0.6, 0.5), 0.3
OUTSIDE = """
from typing import Literal
from speed_engine.kinds import Section
SPACING, LARGEST_MAGNIFICATION, EVALUATIONS = "trailing", 1e300, 1
class Config(Section):
    kind: Literal["mine"] = "mine"
class Straight:
    def step(self, level, x, predict, noise):
        x0, _ = predict(level, x)
        below = 1.0 if level == 0 else float(self.bar[level - 1])
        here = float(self.bar[level])
        eps = (x - here**0.5 * x0) / (1 - here) ** 0.5
        return below**0.5 * x0 + (1 - below) ** 0.5 * eps
def build(alpha_bar, clip_x0):
    one = Straight()
    one.bar = alpha_bar
    return one
"""


@functools.cache
def process(
    schedule: str, objective: str, timesteps: str = "uniform", **settings: object
) -> Process:
    """The process of a table as training builds it."""
    config = kinds.config_of("schedule", {"kind": schedule, **settings})
    told = kinds.config_of("objective", objective)
    table = build_step_table(config, told, kinds.config_of("timesteps", timesteps))
    return Process.of(table.schedule, told, False, (1,), {})


def ideal(process: Process):
    """The network that knows the two points, in the process's own objective and time."""
    schedule, objective = process.schedule, process.objective
    of_out, of_x = objective.x0_columns(schedule)

    def network(x: Tensor, time_B: Tensor) -> Tensor:
        row = int((schedule.time - float(time_B[0])).abs().argmin())
        alpha, sigma = float(schedule.alpha[row]), float(schedule.sigma[row])
        noisy = x.double() / float(objective.input_scale[row])
        low, high = ((noisy - alpha * point).square() / (2 * sigma**2) for point in POINTS)
        odds = torch.sigmoid(low - high + math.log((1 - SHARE) / SHARE))
        x0 = POINTS[0] + (POINTS[1] - POINTS[0]) * odds
        return ((x0 - float(of_x[row]) * noisy) / float(of_out[row])).to(x.dtype)

    return network


def distance(x_N1: Tensor) -> float:
    """W1 to the two points."""
    ordered = x_N1.flatten().double().sort().values
    wanted = torch.full_like(ordered, POINTS[1])
    wanted[: round(SHARE * len(ordered))] = POINTS[0]
    return float((ordered - wanted).abs().mean())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_steps_is_finite_and_ends_at_the_data(sampler: str, schedule: str) -> None:
    objective = {"edm": "edm", "ve": "edm", "rectified_flow": "flow"}.get(schedule, "v")
    one = process(schedule, objective)
    network = ideal(one)
    for steps in (1, 2, 3, 10, 200):
        x = sample(
            network,
            one,
            Recipe(sampler, steps),
            numbers=range(256),
            batch_size=256,
            dtype=torch.float64,
        )
        assert x.isfinite().all(), steps
        if steps == 200:
            assert (
                (x - POINTS[0]).abs().minimum((x - POINTS[1]).abs()) < 0.1
            ).double().mean() > 0.95


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic", "scaled_linear"])
def test_zero_terminal_snr_takes_every_step_there_is(sampler: str, schedule: str) -> None:
    settings = {"zero_terminal_snr": True, "num_steps": 60}
    one = process(schedule, "v", **settings)
    for steps in (1, 2, 30, 59, 60):
        x = sample(ideal(one), one, Recipe(sampler, steps), numbers=range(64), dtype=torch.float64)
        assert x.isfinite().all(), steps
    assert len(kept_steps(one, Recipe(sampler, 60))) == 60


@pytest.mark.parametrize(
    ("schedule", "objective", "density", "sampler", "steps"),
    [
        *(
            ("rectified_flow", "flow", density, "ddim", 50)
            for density in ("uniform", "logit_normal", "laplace", "mode")
        ),
        *(("edm", "edm", density, "heun", 18) for density in ("uniform", "edm", "log_normal")),
    ],
)
def test_levels_do_not_follow_the_training_density(
    schedule: str, objective: str, density: str, sampler: str, steps: int
) -> None:
    one, plain = process(schedule, objective, density), process(schedule, objective)
    recipe = Recipe(sampler, steps)
    levels = [(p.schedule.sigma / p.schedule.alpha)[kept_steps(p, recipe)] for p in (one, plain)]
    assert torch.equal(*levels)
    top, bottom = float(one.schedule.sigma[-1]), float(one.schedule.sigma[0])
    visited = one.schedule.sigma[kept_steps(one, recipe)]
    assert float(visited[-1]) == top and (
        schedule == "rectified_flow" or float(visited[0]) == bottom
    )
    x = sample(ideal(one), one, recipe, numbers=range(8192), batch_size=8192, dtype=torch.float64)
    assert distance(x) < 0.03  # of 8,192 draws of the share: 0.006


def test_karras_levels_are_the_formula() -> None:
    one = process("edm", "edm", "edm")
    sigma = one.schedule.sigma[kept_steps(one, Recipe("heun", 18))].flip(0).numpy()
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    wanted = (high + np.arange(18) / 17 * (low - high)) ** 7
    assert np.abs(np.log(sigma / wanted)).max() < 1e-3
    calls = []
    network = ideal(one)

    def counted(x: Tensor, time_B: Tensor) -> Tensor:
        calls.append(len(x))
        return network(x, time_B)

    sample(counted, one, Recipe("heun", 18), numbers=[0])
    assert len(calls) == 35


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_the_same_in_any_batch(sampler: str) -> None:
    one = process("linear", "v")
    recipe = Recipe(sampler, 5, seed=4)
    whole = sample(ideal(one), one, recipe, numbers=range(6), batch_size=6)
    parts = sample(ideal(one), one, recipe, numbers=[4, 1], batch_size=1)
    assert torch.equal(parts, whole[[4, 1]])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_file_says_what_it_must(sampler: str) -> None:
    module = importlib.import_module(f"speed_engine.sampling.{sampler}")
    assert module.SPACING in ("linspace", "trailing") and module.EVALUATIONS in (1, 2)
    assert module.LARGEST_MAGNIFICATION > 1


def test_a_sampler_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_straight.py").write_text(OUTSIDE)
    (tmp_path / "my_empty.py").write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pack").mkdir()
    for name in ("my_straight", "my_empty"):
        (tmp_path / f"{name}.py").rename(tmp_path / "pack" / f"{name}.py")
    one = process("linear", "v")
    x, by_ddim = (
        sample(ideal(one), one, Recipe(word, 20), numbers=range(8), dtype=torch.float64)
        for word in ("pack.my_straight", "ddim")
    )
    torch.testing.assert_close(x, by_ddim, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"pack.my_empty has no class Config"):
        Recipe("pack.my_empty", 2)
    with pytest.raises(ValueError, match="did you mean 'ddim'"):
        Recipe("ddin", 2)
    sys.modules.pop("pack", None)
