"""One method, then another: the columns before, between and after, and a resume in the middle."""

import importlib

import pytest
import torch

from speed_engine.step_table import StepTable, build_step_table
from speed_engine.timesteps import parse

BATCH = 16


def make(first, then, objective: str = "epsilon", **options) -> StepTable:
    linear = importlib.import_module("speed_engine.schedules.linear").Config(num_steps=40)
    target = importlib.import_module(f"speed_engine.objectives.{objective}").Config()
    method = parse(
        {"kind": "curriculum", "first": first, "then": then, **options}
        if then is not None
        else first
    )
    table = build_step_table(linear, target, method)
    table.start(BATCH, (1, 4, 4))
    return table


def run(table: StepTable, steps: range) -> None:
    """Training steps whose loss rises with the row."""
    for number in steps:
        address_2 = torch.tensor([number, 0])
        _, row_B, _ = table.noise(
            torch.zeros(BATCH, 1), address_2, seed=3, num_slots=BATCH, backend="reference"
        )
        mse_B = 0.1 + row_B / 40
        table.observe(address_2, row_B, torch.stack([mse_B, mse_B, torch.zeros_like(mse_B)]))
        table.refresh(number + 1)


def same(table: StepTable, other: StepTable) -> bool:
    return torch.equal(table.density, other.density) and torch.equal(table.weight, other.weight)


@pytest.mark.parametrize("objective", ["epsilon", "v"])
def test_the_first_until_the_switch_and_the_second_from_it_on(objective):
    table = make("speed", "min_snr", objective, at=7)
    first, then = make("speed", None, objective), make("min_snr", None, objective)
    run(table, range(6))
    assert same(table, first) and table.cdf_T.equal(first.cdf_T)
    run(table, range(6, 7))
    assert same(table, then) and table.cdf_T.equal(then.cdf_T)
    torch.testing.assert_close(table.rows_T8, then.rows_T8)


def test_a_ramp_mixes_the_two_objectives():
    table = make("speed", "p2", at=4, ramp=8)
    first, then = make("speed", None), make("p2", None)
    run(table, range(4))
    assert same(table, first)
    for share in (0.25, 0.5):
        done = round(4 + 8 * share)
        run(table, range(done - 2, done))
        mixed = (1 - share) * first.density + share * then.density
        torch.testing.assert_close(table.density, mixed)
        objective = (1 - share) * first.density * first.weight + share * then.density * then.weight
        torch.testing.assert_close(table.density * table.weight, objective)
    run(table, range(8, 12))
    assert same(table, then)


def test_a_part_learns_while_the_other_one_draws():
    """`then` is what it would be had it watched the first method's draws; it starts warm."""
    table = make("uniform", {"kind": "loss_second_moment", "every": 5, "history": 2}, at=60)
    run(table, range(59))
    assert torch.equal(table.density, table.schedule.uniform)
    run(table, range(59, 60))
    best = (0.1 + torch.arange(40) / 40).double()
    assert (table.density - best / best.sum()).abs().sum() < 0.01


@pytest.mark.parametrize("stop", [3, 10, 16, 23])
def test_a_resumed_run_is_the_same_run(stop):
    learned = {"kind": "loss_second_moment", "every": 5, "history": 1}
    whole, part = (make(learned, "speed", at=10, ramp=8) for _ in range(2))
    run(whole, range(30))
    run(part, range(stop))
    again = make(learned, "speed", at=10, ramp=8)
    again.load_state_dict(part.state_dict(), stop)
    assert same(again, part)
    run(again, range(stop, 30))
    assert same(again, whole)


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("adaptive", "cannot be adaptive, which draws by itself"),
        ({"kind": "combine", "parts": ["p2"]}, r"timesteps.first cannot be combine"),
        ({"kind": "speed", "normalise": True}, "timesteps.first: normalise and weight_vb"),
        ("sped", "did you mean 'speed'"),
    ],
)
def test_what_cannot_be_a_part_is_refused(first, message):
    with pytest.raises(ValueError, match=message):
        make(first, "uniform", at=5)
