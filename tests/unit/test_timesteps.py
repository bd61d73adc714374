"""Time-step methods that are formulas: golden values of SpeeD, laws that every method keeps, refusals."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "timesteps.json").read_text())["rows"]


def make_schedule(kind: str, **options) -> Schedule:
    module = importlib.import_module(f"speed_engine.schedules.{kind}")
    return module.build(module.Config(**options))


def make(kind: str, schedule: str | Schedule = "linear", **options) -> Method:
    module = importlib.import_module(f"speed_engine.timesteps.{kind}")
    if isinstance(schedule, str):
        schedule = make_schedule(schedule)
    return module.build(module.Config(**options), schedule)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda row: row["schedule"])
def test_speed_matches_golden_values(golden):
    method = make("speed", golden["schedule"], k=golden["k"], lam=golden["lam"], tau=golden["tau"])
    for row, value in golden["density"].items():
        assert method.density[int(row)].item() == pytest.approx(value, abs=1e-12)
    for row, value in golden["weight"].items():
        assert method.weight[int(row)].item() == pytest.approx(value, abs=1e-9)
    assert method.density[700:].sum().item() == pytest.approx(golden["mass_above_tau"], abs=1e-12)
    expected = (method.density * method.weight).sum().item()
    assert expected == pytest.approx(golden["expected_weight"], abs=1e-9)


def test_speed_weights_of_the_linear_schedule():
    weight = make("speed").weight
    rows = (0, 1, 10, 50, 100, 200, 219, 250, 300, 400, 500, 600, 699, 800, 999)
    expected = "4088 4095 4227 4791 5389 5986 6000 5962 5774 5158 4580 4228 4072 4017 4000"
    for row, digits in zip(rows, expected.split(), strict=True):
        assert weight[row].item() == pytest.approx(float(f"0.{digits}"), abs=5.1e-5)


def test_speed_density_of_the_linear_schedule():
    method = make("speed")
    assert method.tau == 700
    assert method.density[0].item() == pytest.approx(1 / 760, abs=1e-15)
    assert method.density[700].item() == pytest.approx(1 / 3800, abs=1e-15)
    assert method.density[:700].sum().item() == pytest.approx(0.92105, abs=6e-6)


def test_speed_threshold():
    assert make("speed", "cosine", r=139).tau == 945
    assert make("speed", "cosine").tau == 700
    assert make("speed", make_schedule("linear", num_steps=50)).tau == 35
    assert make("speed", tau=1000, k=5).density.unique().numel() == 1
    assert make("speed", k=1).density.unique().numel() == 1
    with pytest.raises(ValueError, match="tau=1001 is above the schedule's 1000 steps"):
        make("speed", tau=1001)
    with pytest.raises(ValueError, match="scaled_linear never reaches r=1000"):
        make("speed", "scaled_linear", r=1000)
    with pytest.raises(ValueError, match="suppresses every step"):
        make("speed", r=1.00001)


def test_half_lambda_is_no_weighting():
    assert (make("speed", lam=0.5).weight == 0.5).all()


def test_change_aware_factor_moves_into_the_sampling():
    """Sampling by the factor and weighting by it are the same expectation."""
    weighted, sampled, plain = (
        make("speed", change_aware=form) for form in ("weight", "density", "off")
    )
    loss = torch.linspace(0.1, 1, 1000, dtype=torch.float64).sin()
    by_weight = (weighted.density * weighted.weight * loss).sum() / (
        weighted.density * weighted.weight
    ).sum()
    torch.testing.assert_close((sampled.density * loss).sum(), by_weight, rtol=1e-12, atol=0)
    assert (sampled.weight == 1).all()
    assert (plain.weight == 1).all()
    assert torch.equal(plain.density, weighted.density)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 700, "r": 139}, "give one of them"),
        ({"lam": 0.4}, "greater than or equal to 0.5"),
        ({"lam": 1.1}, "less than or equal to 1"),
        ({"k": 0.5}, "greater than or equal to 1"),
        ({"tau": 0}, "greater than or equal to 1"),
        ({"r": 1}, "greater than 1"),
        ({"kk": 5}, "Extra inputs"),
    ],
)
def test_wrong_parameters_of_speed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("speed", **options)
