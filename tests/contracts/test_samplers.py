"""Every sampler of the folder and one outside: what `speed_engine.sampling` promises, on every schedule."""

from __future__ import annotations

import functools
import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_engine import kinds
from speed_engine.sampling.process import Process, Recipe, sample
from speed_engine.schedules import Schedule, interpolate
from speed_engine.step_table import build_step_table

SAMPLERS = kinds.names("sampling")
SCHEDULES = kinds.names("schedule")
FEW = 60  # rows of the table, where a test visits all of them
# Two points, unequally likely: the ideal denoiser is a sigmoid, and W1 to it is easily told.
POINTS, SHARE = (-0.6, 0.5), 0.3
OUTSIDE = """
from typing import Literal
from speed_engine.kinds import Section
SPACING, LARGEST_MAGNIFICATION = "trailing", 1e300
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


def objective_of(schedule: str) -> str:
    """One that is defined at every level of the schedule."""
    return {"edm": "edm", "ve": "edm", "rectified_flow": "flow"}.get(schedule, "v")


@functools.cache
def process(
    schedule: str, objective: str = "", timesteps: str = "uniform", **settings: object
) -> Process:
    """The process of a table as training builds it."""
    config = kinds.config_of("schedule", {"kind": schedule, **settings})
    told = kinds.config_of("objective", objective or objective_of(schedule))
    table = build_step_table(config, told, kinds.config_of("timesteps", timesteps))
    return Process.of(table.schedule, told, False, (1,), {})


def variants(schedule: str) -> list[dict[str, Any]]:
    """The settings of a schedule of FEW rows, with and without zero terminal SNR where it has that."""
    fields = kinds.find("schedule", schedule).Config.model_fields
    size = {"num_steps" if "num_steps" in fields else "num_cells": FEW}
    return [size, size | {"zero_terminal_snr": True}] if "zero_terminal_snr" in fields else [size]


def place_of(schedule: Schedule, time: float) -> tuple[float, float]:
    """alpha and sigma where the network is told `time`, between the rows, too."""
    if schedule.curve is None:
        row = int((schedule.time - time).abs().argmin())
        return float(schedule.alpha[row]), float(schedule.sigma[row])
    half = schedule.measure[[0, -1]] / 2 * torch.tensor([-1, 1])
    ends = schedule.coordinate[[0, -1]] + half
    known = torch.cat([ends[:1], schedule.coordinate, ends[1:]])
    at = interpolate(torch.tensor([time]).double(), schedule.curve(known)[2], known)
    alpha, sigma, _ = schedule.curve(at)
    return max(0.0, float(alpha)), float(sigma)


def ideal(process: Process, points: tuple[float, float] = POINTS):
    """The network that knows the two points, in the process's own objective and time."""
    schedule = process.schedule.unmoved

    def network(x: Tensor, time_B: Tensor) -> Tensor:
        alpha, sigma = place_of(schedule, float(time_B[0]))
        level = Schedule(
            "one", *(torch.tensor([each]).double() for each in (alpha, sigma, 0, 0, 0))
        )
        level = Schedule(**{**vars(level), "sigma_data": schedule.sigma_data, "original": schedule})
        objective = process.objective_on(level)
        of_out, of_x = objective.x0_columns(level)
        noisy = x.double() / objective.input_scale
        low, high = ((noisy - alpha * point).square() / (2 * sigma**2) for point in points)
        odds = torch.sigmoid(low - high + math.log((1 - SHARE) / SHARE))
        x0 = points[0] + (points[1] - points[0]) * odds
        return ((x0 - of_x * noisy) / of_out).to(x.dtype)

    return network


def distance(x_N1: Tensor) -> float:
    """W1 to the two points."""
    ordered = x_N1.flatten().double().sort().values
    wanted = torch.full_like(ordered, POINTS[1])
    wanted[: round(SHARE * len(ordered))] = POINTS[0]
    return float((ordered - wanted).abs().mean())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_many_steps_end_at_the_data(sampler: str, schedule: str) -> None:
    one = process(schedule)
    x = sample(
        ideal(one),
        one,
        Recipe(sampler, 200),
        numbers=range(256),
        batch_size=256,
        dtype=torch.float64,
    )
    near = (x - POINTS[0]).abs().minimum((x - POINTS[1]).abs()) < 0.1
    assert near.double().mean() > 0.95


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_number_of_steps_is_finite_and_its_levels_fall(sampler: str, schedule: str) -> None:
    """Float32, as the command samples: two levels that are equal there would be a step of length 0."""
    for settings in variants(schedule):
        one = process(schedule, **settings)
        counts = [1, 2, 3, 10, FEW // 2, FEW - 1, FEW]
        counts += [4 * FEW] if one.schedule.continuous else []
        for steps in counts:
            recipe = Recipe(sampler, steps)
            found = one.levels(recipe)
            assert len(found.alpha_bar) == steps and (np.diff(found.alpha_bar) < 0).all()
            x = sample(ideal(one), one, recipe, numbers=range(32))
            assert x.isfinite().all() and x.abs().max() < 2, (settings, steps)


@pytest.mark.parametrize(
    "schedule", [each for each in SCHEDULES if "zero_terminal_snr" in variants(each)[-1]]
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_takes_every_step_of_a_thousand(sampler: str, schedule: str) -> None:
    """The last rows have an alpha_bar that a solver cannot divide by: several of them on the linear schedule."""
    one = process(schedule, zero_terminal_snr=True)
    low = (one.levels(Recipe(sampler, 1000)).alpha_bar < 2.0**-24).sum()
    assert low >= (2 if schedule == "linear" else 1)
    for steps in (500, 1000):
        x = sample(ideal(one), one, Recipe(sampler, steps), numbers=range(8))
        assert x.isfinite().all() and x.abs().max() < 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_single_point_is_met_in_any_number_of_steps(sampler: str, schedule: str) -> None:
    """x0 is known at every level: each step is exact, the first as the last."""
    for settings in variants(schedule):
        one = process(schedule, **settings)
        for steps in (1, 2, 7, FEW):
            recipe = Recipe(sampler, steps)
            network = ideal(one, (0.4, 0.4))
            x = sample(network, one, recipe, numbers=range(4), dtype=torch.float64)
            assert (x - 0.4).abs().max() < 1e-3, (settings, steps)  # the network's time is float32


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_can_be_predicted_on_every_schedule(sampler: str, schedule: str) -> None:
    one = process(schedule, "epsilon")
    for steps in (1, 25):
        x = sample(ideal(one), one, Recipe(sampler, steps), numbers=range(64), dtype=torch.float64)
        assert x.isfinite().all() and x.abs().max() < 2


@pytest.mark.parametrize(
    ("schedule", "density", "sampler", "steps"),
    [
        *(
            ("rectified_flow", density, "ddim", 50)
            for density in ("uniform", "logit_normal", "laplace", "mode")
        ),
        *(("edm", density, "heun", 18) for density in ("uniform", "edm", "log_normal")),
    ],
)
def test_levels_do_not_follow_the_training_density(
    schedule: str, density: str, sampler: str, steps: int
) -> None:
    one, plain = process(schedule, timesteps=density), process(schedule)
    recipe = Recipe(sampler, steps)
    found, wanted = one.levels(recipe), plain.levels(recipe)
    for name, column in vars(found).items():
        assert np.array_equal(column, vars(wanted)[name]), name
    x = sample(ideal(one), one, recipe, numbers=range(2**17), batch_size=2**17, dtype=torch.float64)
    assert distance(x) < 0.01  # the share of 2^17 draws alone: 0.0014


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_the_same_in_any_batch(sampler: str) -> None:
    one = process("linear")
    recipe = Recipe(sampler, 5, seed=4)
    whole = sample(ideal(one), one, recipe, numbers=range(6), batch_size=6)
    parts = sample(ideal(one), one, recipe, numbers=[4, 1], batch_size=1)
    assert torch.equal(parts, whole[[4, 1]])
    other = sample(ideal(one), one, Recipe(sampler, 5, seed=5), numbers=range(6), batch_size=6)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_file_says_what_it_must(sampler: str) -> None:
    module = importlib.import_module(f"speed_engine.sampling.{sampler}")
    assert module.SPACING in ("linspace", "leading", "trailing")
    assert module.LARGEST_MAGNIFICATION > 1


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package from outside; a module of it is what a test writes there."""
    folder = tmp_path / "sampler_pack"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_sampler_from_outside(outside: Path) -> None:
    (outside / "straight.py").write_text(OUTSIDE)
    one = process("linear")
    x, by_ddim = (
        sample(ideal(one), one, Recipe(word, 20), numbers=range(8), dtype=torch.float64)
        for word in ("sampler_pack.straight", "ddim")
    )
    torch.testing.assert_close(x, by_ddim, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("word", "text", "sentence"),
    [
        ("sampler_pack.no_config", "x = 1", "sampler_pack.no_config has no class Config"),
        ("sampler_pack.no_spacing", OUTSIDE.replace("SPACING,", "_,"), "has no SPACING"),
        ("sampler_pack.no_build", OUTSIDE.replace("def build", "def make"), "no function build"),
        ("ddin", "", "did you mean 'ddim'"),
        ("sampler_pack.nowhere", "", "cannot import"),
    ],
)
def test_a_sampler_that_is_none_is_one_sentence(
    outside: Path, word: str, text: str, sentence: str
) -> None:
    if text:
        (outside / f"{word.partition('.')[2]}.py").write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        Recipe(word, 2)
    assert "\n" not in str(caught.value)
