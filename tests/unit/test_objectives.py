"""Objectives: the columns of the target, and the way back to x0."""

import importlib
import sys

import pytest
import torch

from speed_engine import kinds
from speed_engine.__main__ import main
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


# Densities that exist for numbered steps only.
DISCRETE_ONLY = {"speed_official", "log_normal_speed_release", "clts_speed_release"}
NEEDED = {
    "combine": {"parts": ["log_normal", {"kind": "laplace", "b": 2}]},
    "curriculum": {"first": "log_normal", "then": "uniform", "at": 10},
}


def fdm_table(schedule: str, density: str):
    return build_step_table(
        kinds.config_of("schedule", schedule),
        kinds.config_of("objective", "fdm"),
        kinds.config_of("timesteps", {"kind": density, **NEEDED.get(density, {})}),
    )


def momentum(sigma: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """s = (1 + 2 B) exp(-2 B) of sigma's place between the schedule's own ends."""
    place = (sigma - low) / (high - low)
    b = 2 * (0.1 * place + 19.9 * place.square() / 2)
    return (1 + b) * torch.exp(-b)


@pytest.mark.parametrize(("schedule", "low", "high"), [("edm", 0.002, 80.0), ("ve", 0.02, 100.0)])
@pytest.mark.parametrize("density", [k for k in kinds.names("timesteps") if k not in DISCRETE_ONLY])
def test_fdm_scales_its_input_by_sigma_whatever_the_density(density, schedule, low, high):
    table = fdm_table(schedule, density)
    sigma, scale = table.schedule.sigma, table.objective.input_scale
    torch.testing.assert_close(scale, momentum(sigma, low, high), rtol=1e-9, atol=1e-12)
    # what the kernels multiply eps by
    torch.testing.assert_close(table.rows_T8[:, 1].double(), sigma * scale, rtol=1e-6, atol=1e-12)


def test_fdm_at_sigma_20_through_the_command_line(monkeypatch, capsys):
    """s(20) is 0.629 under EDM's own density, whose outermost row lies far below sigma = 80."""
    seen = []

    def shown(table, form):
        seen.append(table)
        return "{}"

    monkeypatch.setattr("speed_engine.reports.table.report", shown)
    words = ["schedule=edm", "objective=fdm", "timesteps=edm", "learned_variance=false"]
    monkeypatch.setattr(sys, "argv", ["speed_engine", "table", *words, "--json"])
    assert main() == 0, capsys.readouterr().err
    (table,) = seen
    sigma = table.schedule.sigma
    assert sigma.max() < 50
    row = int((sigma - 20).abs().argmin())
    assert sigma[row].item() == pytest.approx(20, rel=0.05)
    expected = momentum(sigma[row], 0.002, 80.0).item()
    assert table.objective.input_scale[row].item() == pytest.approx(expected, rel=1e-9)
    assert momentum(torch.tensor(20.0), 0.002, 80.0).item() == pytest.approx(0.629, abs=5e-4)


@pytest.mark.parametrize("scale", ["unit", "edm"])
def test_fdm_without_momentum_needs_no_range(scale):
    """Rectified flow has no largest sigma / alpha; the other two input scales do not ask for it."""
    table = build_step_table(
        kinds.config_of("schedule", "rectified_flow"),
        kinds.config_of("objective", {"kind": "fdm", "input_scale": scale}),
        kinds.config_of("timesteps", "uniform"),
    )
    on = table.schedule
    sigma = on.sigma / on.alpha
    expected = torch.ones_like(sigma) if scale == "unit" else 1 / (sigma.square() + 1).sqrt()
    torch.testing.assert_close(table.objective.input_scale * on.alpha, expected)


@pytest.mark.parametrize("kind", ["edm", "fdm"])
def test_a_refusal_at_zero_snr_names_the_objective_asked_for(kind):
    with pytest.raises(ValueError, match=rf"objective\.kind={kind} is not defined at zero SNR"):
        make(kind, linear.build(linear.Config(zero_terminal_snr=True)))


def test_fdm_is_refused_where_sigma_has_no_end():
    with pytest.raises(ValueError, match="fdm is not defined at zero SNR"):
        build_step_table(
            kinds.config_of("schedule", "rectified_flow"),
            kinds.config_of("objective", "fdm"),
            kinds.config_of("timesteps", "uniform"),
        )
