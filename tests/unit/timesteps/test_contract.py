"""What every time-step method keeps on every schedule; the folders are listed, so a new file is tested at once."""

import importlib

import pytest
import torch

from speed_engine import kinds
from speed_engine.step_table import StepTable, build_step_table
from speed_engine.timesteps import parse

PARTS = {
    "combine": {"parts": ["log_normal", "min_snr"]},
    "curriculum": {"first": "log_normal", "then": "min_snr", "at": 10},
}
# Needs (numbered steps) that a schedule may lack; anything else has to work.
DISCRETE_ONLY = {"speed_official", "log_normal_speed_release", "clts_speed_release"}
CONTINUOUS = {"continuous_vp", "ve", "edm", "rectified_flow"}


def config(folder: str, kind: str, **options):
    return importlib.import_module(f"speed_engine.{folder}.{kind}").Config(**options)


def small(kind: str):
    return config("schedules", kind, **({"num_cells": 512} if kind in CONTINUOUS else {}))


def make(kind: str, schedule: str, objective: str = "epsilon", **options) -> StepTable:
    method = parse({"kind": kind, **PARTS.get(kind, {}), **options})
    return build_step_table(small(schedule), config("objectives", objective), method)


@pytest.mark.parametrize("schedule", kinds.names("schedule"))
@pytest.mark.parametrize("kind", kinds.names("timesteps"))
def test_every_method_on_every_schedule(kind, schedule):
    if kind in DISCRETE_ONLY and schedule in CONTINUOUS:
        with pytest.raises(ValueError, match=f"{kind} is defined for numbered steps"):
            make(kind, schedule)
        return
    table = make(kind, schedule)
    assert table.density.sum().item() == pytest.approx(1, abs=1e-12)
    for column in (table.density, table.weight):
        assert column.dtype == torch.float64
        assert torch.isfinite(column).all()
        assert (column >= 0).all()
    assert torch.isfinite(table.rows_T8).all()
    assert table.cdf_T[-1] == 2**32
    assert (table.cdf_T.diff() >= 0).all()
    if schedule in CONTINUOUS and not table.changes:
        # Cells of equal mass: the CDF is a straight line.
        line = torch.arange(1, 513) * 2**23
        assert torch.equal(table.cdf_T, line)
    normal = make(kind, schedule, normalise=True)
    assert (normal.density * normal.weight).sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("kind", kinds.names("timesteps"))
@pytest.mark.parametrize("objective", ["x0", "v"])
def test_every_method_at_zero_snr(kind, objective):
    """Finite, or refused with the reason."""
    schedule = config("schedules", "linear", zero_terminal_snr=True)
    method = parse({"kind": kind, **PARTS.get(kind, {})})
    try:
        table = build_step_table(schedule, config("objectives", objective), method)
    except ValueError as error:
        assert "not finite" in str(error)
        return
    assert torch.isfinite(table.weight).all()
    assert table.density.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("objective", kinds.names("objective"))
@pytest.mark.parametrize("schedule", kinds.names("schedule"))
def test_every_objective_on_every_schedule(objective, schedule):
    """The columns give x0 back, or the pair is refused with the reason."""
    try:
        table = make("uniform", schedule, objective)
    except ValueError as error:
        assert f"objective.kind={objective}" in str(error)
        return
    on, target = table.schedule, table.objective
    x0, eps = torch.randn(2, on.num_rows, generator=torch.Generator().manual_seed(0)).double()
    x_t = on.alpha * x0 + on.sigma * eps
    by_output, by_x_t = target.x0_columns(on)
    output = target.target_x0 * x0 + target.target_eps * eps
    torch.testing.assert_close(by_output * output + by_x_t * x_t, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", kinds.names("timesteps"))
def test_every_method_explains_itself(kind):
    module = importlib.import_module(f"speed_engine.timesteps.{kind}")
    assert module.__doc__ and len(module.__doc__.split()) >= 12
    assert module.Config.model_fields["kind"].default == kind
    assert module.Config.model_config["extra"] == "forbid"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("min_snr", {"gamma": -1}),
        ("p2", {"gamma": -0.5}),
        ("p2", {"k": 0}),
        ("speed_u", {"k": 0.5}),
        ("speed_u", {"lam": 0.3}),
        ("speed_official", {"tau": 1001}),
        ("log_normal", {"std": 0}),
        ("mode", {"scale": 2}),
        ("beta", {"a": 0}),
        ("laplace", {"b": 0}),
        ("clts", {"sigma": 0}),
        ("clts_speed_release", {"mu": 1000}),
        ("task_curriculum", {"num_clusters": 1001}),
        ("ant_uw", {"num_clusters": 1001}),
        ("adaptive", {"sweep_every": 50}),
        ("adaptive", {"num_selected": 200}),
        ("infonoise", {"onset": 1}),
        ("curriculum", {"at": 0}),
        ("curriculum", {"ramp": -1}),
        ("loss_second_moment", {"history": 0}),
    ],
)
def test_wrong_parameters_are_refused(kind, options):
    with pytest.raises(ValueError) as error:
        make(kind, "linear", **{**PARTS.get(kind, {}), **options})
    assert next(iter(options)) in str(error.value)


def test_unknown_kinds_list_what_exists():
    with pytest.raises(ValueError, match=r"did you mean 'min_snr'.*there are: adaptive, ant_uw"):
        parse("min_snrr")


def test_golden_rates_of_continuous_schedules():
    """tau(r) of VP and rectified flow in closed form; du peaks at 0.2191 and at 2.0."""
    vp, flow = (
        importlib.import_module(f"speed_engine.schedules.{kind}").build(config("schedules", kind))
        for kind in ("continuous_vp", "rectified_flow")
    )
    for r, expected in ((10, 0.476), (100, 0.675), (138.6, 0.699), (1000, 0.828)):
        assert vp.coordinate[vp.first_row(r)].item() == pytest.approx(expected, abs=6e-4)
    for r, expected in ((10, 0.75), (100, 0.909), (139, 0.922)):
        assert flow.coordinate[flow.first_row(r)].item() == pytest.approx(expected, abs=6e-4)
    assert vp.coordinate[vp.noise_rate.argmax()].item() == pytest.approx(0.2191, abs=1e-4)
    assert flow.noise_rate.max().item() == pytest.approx(2.0, abs=1e-6)
    above = {
        kind: importlib.import_module(f"speed_engine.schedules.{kind}").build(
            config("schedules", kind)
        )
        for kind in ("ve", "continuous_vp", "rectified_flow")
    }
    shares = {kind: on.uniform[on.first_row(139) :].sum().item() for kind, on in above.items()}
    assert shares == pytest.approx(
        {"ve": 0.333, "continuous_vp": 0.3008, "rectified_flow": 0.0784}, abs=5e-4
    )
