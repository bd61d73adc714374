"""Objectives: the columns of the target, and the way back to x0."""

import importlib

import pytest
import torch

from speed_engine import kinds
from speed_engine.schedules import cosine, linear

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
