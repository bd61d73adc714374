"""The levels of continuous time against their formulas, and what has none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from speed_engine import kinds
from speed_engine.sampling import grid
from speed_engine.sampling.process import Process, Recipe
from speed_engine.step_table import build_step_table


def process(schedule: dict[str, Any], objective: str, timesteps: str = "uniform") -> Process:
    """As training builds it: the schedule is the table's, with moved rows."""
    told = kinds.config_of("objective", objective)
    config = kinds.config_of("schedule", schedule)
    table = build_step_table(config, told, kinds.config_of("timesteps", timesteps))
    return Process.of(table.schedule, told, False, (1,), {})


FLOW, EDM = {"kind": "rectified_flow"}, {"kind": "edm"}


@pytest.mark.parametrize("cells", [16, 60, 1000, 16384])
@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_rectified_flow_goes_from_one_down_in_even_parts(timesteps: str, cells: int) -> None:
    one = process(FLOW | {"num_cells": cells}, "flow", timesteps)
    levels = one.levels(Recipe("ddim", 50))
    t = np.arange(1, 51) / 50
    np.testing.assert_allclose(levels.time, 1000 * t, rtol=1e-14)
    np.testing.assert_allclose(levels.place, t, rtol=1e-12)
    norm = np.hypot(1 - t, t)
    np.testing.assert_allclose(levels.alpha_bar, ((1 - t) / norm) ** 2, rtol=1e-12, atol=1e-30)
    np.testing.assert_allclose(levels.input_scale, norm, rtol=1e-12)
    # x0 = x - t f, of x_t = norm x
    np.testing.assert_allclose(levels.of_out, -t, rtol=1e-12)
    np.testing.assert_allclose(levels.of_x, norm, rtol=1e-12)


def test_shift_of_schedule_and_recipe() -> None:
    u = np.arange(1, 11) / 10
    shifted = 3 * u / (1 + 2 * u)
    by_recipe = process(FLOW, "flow").levels(Recipe("ddim", 10, shift=3.0))
    by_schedule = process(FLOW | {"shift": 3.0}, "flow").levels(Recipe("ddim", 10))
    for levels in (by_recipe, by_schedule):
        np.testing.assert_allclose(levels.time, 1000 * shifted, rtol=1e-12)


@pytest.mark.parametrize("timesteps", ["uniform", "edm"])
@pytest.mark.parametrize("sampler", ["heun", "ddim", "dpmpp"])
def test_edm_goes_from_sigma_max_to_sigma_min_as_karras(sampler: str, timesteps: str) -> None:
    levels = process(EDM, "edm", timesteps).levels(Recipe(sampler, 18))
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = (high + np.arange(18) / 17 * (low - high))[::-1] ** 7
    np.testing.assert_allclose(np.exp(4 * levels.time), sigma, rtol=1e-12)
    np.testing.assert_allclose(levels.alpha_bar, 1 / (1 + sigma**2), rtol=1e-12)
    share = np.log(sigma / 0.002) / math.log(80 / 0.002)
    np.testing.assert_allclose(levels.place, share, rtol=1e-9, atol=1e-9)
    total = np.sqrt(sigma**2 + 0.25)  # Karras et al., table 1
    np.testing.assert_allclose(levels.input_scale, np.sqrt(1 + sigma**2) / total, rtol=1e-11)
    np.testing.assert_allclose(levels.of_out, 0.5 * sigma / total, rtol=1e-11)
    np.testing.assert_allclose(levels.of_x, 0.25 / total**2 * np.sqrt(1 + sigma**2), rtol=1e-8)


@pytest.mark.parametrize("kind", ["continuous_vp", "rectified_flow"])
def test_karras_levels_where_the_coordinate_is_not_ln_sigma(kind: str) -> None:
    one = process({"kind": kind}, "v" if kind == "continuous_vp" else "flow")
    levels = one.levels(Recipe("heun", 30, spacing="karras"))
    ratio = np.sqrt((1 - levels.alpha_bar) / levels.alpha_bar)
    root = ratio ** (1 / 7)
    np.testing.assert_allclose(ratio, np.linspace(root[0], root[-1], 30) ** 7, rtol=1e-6)
    assert ratio[-1] == pytest.approx({"continuous_vp": 152.2, "rectified_flow": 4096}[kind], 1e-3)
    assert one.schedule.curve is not None
    alpha, sigma, time = one.schedule.curve(torch.from_numpy(levels.time) / 1000)
    np.testing.assert_allclose(time.numpy(), levels.time)
    np.testing.assert_allclose((sigma / alpha).numpy(), ratio, rtol=1e-6)


@pytest.mark.parametrize("input_scale", ["momentum", "edm"])
def test_an_objective_with_a_range_keeps_it_between_the_rows(input_scale: str) -> None:
    """FDM's momentum at a level is a function of sigma alone, whatever levels are visited beside it."""
    told = kinds.config_of("objective", {"kind": "fdm", "input_scale": input_scale})
    schedule = kinds.find("schedule", "edm").build(kinds.config_of("schedule", EDM))
    one = Process.of(schedule, told, False, (1,), {})
    few, many = one.levels(Recipe("heun", 18)), one.levels(Recipe("heun", 35))
    np.testing.assert_allclose(few.input_scale, many.input_scale[::2], rtol=1e-9)
    sigma = np.exp(4 * few.time)
    if input_scale == "momentum":
        place = (sigma - 0.002) / (80 - 0.002)
        b = 2.0 * (0.1 * place + 19.9 * place**2 / 2)
        wanted = (1 + b) * np.exp(-b)
        np.testing.assert_allclose(few.input_scale / np.sqrt(1 + sigma**2), wanted, rtol=1e-9)


def test_an_objective_with_a_range_keeps_it_on_few_of_the_rows() -> None:
    one = process({"kind": "linear"}, "fdm")
    few, every = one.levels(Recipe("ddim", 10)), one.levels(Recipe("ddim", 1000))
    at = few.time.astype(int)
    for name, column in vars(few).items():
        np.testing.assert_array_equal(column, vars(every)[name][at], err_msg=name)


def test_epsilon_starts_where_x0_can_be_told() -> None:
    levels = process(FLOW, "epsilon").levels(Recipe("ddim", 10))
    assert levels.time[-1] < 1000 and np.abs(levels.of_out).max() <= math.exp(5.1) * 1.001
    assert levels.alpha_bar[-1] == pytest.approx(1 / (1 + math.exp(10.2)), rel=0.02)
    whole = process(FLOW, "epsilon").levels(Recipe("ddpm", 10))
    assert whole.time[-1] == pytest.approx(1000 * (1 - 0.5 / 16384)) and whole.alpha_bar[-1] > 0


def test_levels_stay_where_sigma_is_not_zero() -> None:
    for schedule in (FLOW, {"kind": "continuous_vp", "t_min": 0.0}):
        objective = "flow" if schedule is FLOW else "v"
        levels = process(schedule, objective).levels(Recipe("ddpm", 9))
        assert levels.alpha_bar[0] < 1 and np.isfinite(levels.of_x).all()


def test_rows_of_many_steps_at_zero_snr_are_told_apart_in_float32() -> None:
    bar = np.concatenate([np.linspace(0.9, 1e-3, 10), np.linspace(1e-9, 0, 5000)])
    lifted = grid.strictly_falling(bar)
    assert np.array_equal(lifted[:10], bar[:10])
    ratio = np.sqrt(1 / lifted - 1).astype(np.float32)
    assert (np.diff(ratio) > 0).all() and np.isfinite(ratio).all()


@pytest.mark.parametrize(
    ("schedule", "objective", "recipe", "words"),
    [
        ({"kind": "linear"}, "v", {"spacing": "karras"}, "needs a continuous schedule"),
        ({"kind": "linear"}, "v", {"shift": 2.0}, "numbered steps"),
        (EDM, "edm", {"shift": 2.0}, "Karras levels"),
        ({"kind": "linear", "num_steps": 30}, "v", {"steps": 31}, "more than the 30"),
    ],
)
def test_what_a_schedule_has_not_is_refused(schedule, objective, recipe, words: str) -> None:
    one = process(schedule, objective)
    with pytest.raises(ValueError, match=words) as caught:
        one.levels(Recipe(**{"sampler": "heun", "steps": 4, **recipe}))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="shift must be a number above 0"):
        Recipe(shift=0.0)
