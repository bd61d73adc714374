"""Objectives: the columns of the target, and the way back to x0."""

import importlib

import pytest
import torch

from speed_engine import kinds
from speed_engine.schedules import cosine, linear
from speed_engine.step_table import build_step_table

SCHEDULE = linear.build(linear.Config(num_steps=50))


def make(kind: str, schedule=SCHEDULE):
    module = importlib.import_module(f"speed_engine.objectives.{kind}")
    return module.build(module.Config(), schedule)


@pytest.mark.parametrize("kind", ["epsilon", "x0", "v"])
def test_the_way_back_to_x0(kind):
    """A perfect network's output at x_t gives x0 back, at every row."""
    x0, eps = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = make(kind)
    x_t = SCHEDULE.alpha * x0 + SCHEDULE.sigma * eps
    target = objective.target_x0 * x0 + objective.target_eps * eps
    from_output, from_x_t = objective.x0_columns(SCHEDULE)
    torch.testing.assert_close(from_output * target + from_x_t * x_t, x0, rtol=1e-6, atol=1e-6)


def test_gain_is_the_sensitivity_of_the_target():
    snr = SCHEDULE.snr
    torch.testing.assert_close(make("epsilon").gain(SCHEDULE).square(), snr)
    torch.testing.assert_close(make("x0").gain(SCHEDULE).square(), torch.ones_like(snr))
    torch.testing.assert_close(make("v").gain(SCHEDULE).square(), snr + 1)


def test_epsilon_is_refused_at_zero_snr():
    schedule = cosine.build(cosine.Config(zero_terminal_snr=True))
    with pytest.raises(ValueError, match=r"use objective\.kind=v"):
        make("epsilon", schedule)
    assert torch.isfinite(make("v", schedule).gain(schedule)).all()


def test_names_are_the_files():
    assert {"epsilon", "x0", "v"} <= set(kinds.names("objective"))


def moved(schedule: str, density: str):
    """The table's schedule under a density, or None where the two do not go together."""
    try:
        config = kinds.config_of("schedule", schedule)
        table = build_step_table(
            config, kinds.config_of("objective", "fdm"), kinds.config_of("timesteps", density)
        )
    except ValueError:
        return None
    return table


@pytest.mark.parametrize(("schedule", "low", "high"), [("edm", 0.002, 80.0), ("ve", 0.02, 100.0)])
def test_fdm_scales_its_input_by_sigma_whatever_the_density(schedule, low, high):
    """s = (1 + 2 B) exp(-2 B) of sigma's place between the schedule's own ends."""
    seen = []
    for density in kinds.names("timesteps"):
        table = moved(schedule, density)
        if table is None or table.timesteps.model_dump()["kind"] != density:
            continue
        seen.append(density)
        sigma = table.schedule.sigma
        place = (sigma - low) / (high - low)
        b = 2 * (0.1 * place + 19.9 * place.square() / 2)
        torch.testing.assert_close(
            table.objective.input_scale, (1 + b) * torch.exp(-b), rtol=1e-9, atol=1e-12
        )
    assert {"uniform", "edm", "log_normal", "speed_u"} <= set(seen) or len(seen) > 5
    plain = table_of("edm", "uniform")
    near_20 = int((plain.schedule.sigma - 20).abs().argmin())
    assert plain.objective.input_scale[near_20].item() == pytest.approx(0.629, abs=1e-3)


def table_of(schedule: str, density: str):
    table = moved(schedule, density)
    assert table is not None
    return table


def test_fdm_is_refused_where_sigma_has_no_end():
    with pytest.raises(ValueError, match="fdm is not defined at zero SNR"):
        build_step_table(
            kinds.config_of("schedule", "rectified_flow"),
            kinds.config_of("objective", "fdm"),
            kinds.config_of("timesteps", "uniform"),
        )
