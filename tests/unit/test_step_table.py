"""The step table: packed columns against the formulas they stand for, the integer CDF, and the library entry."""

import importlib
import pickle

import pytest
import torch

from speed_engine import StepTable
from speed_engine.kinds import ConfigError, names
from speed_engine.objectives import COLUMNS
from speed_engine.step_table import build_step_table
from speed_engine.timesteps import integer_cdf


def config(folder: str, kind: str, **options):
    return importlib.import_module(f"speed_engine.{folder}.{kind}").Config(**options)


def make(schedule="linear", objective="epsilon", timesteps="speed", learned=True, **options):
    return build_step_table(
        config("schedules", schedule),
        config("objectives", objective),
        config("timesteps", timesteps, **options),
        learned,
    )


def column(table: StepTable, name: str) -> torch.Tensor:
    return table.rows_T8[:, COLUMNS.index(name)].double()


@pytest.mark.parametrize("schedule", ["linear", "quadratic", "cosine", "scaled_linear"])
def test_columns_of_the_forward_process(schedule):
    table = make(schedule)
    assert table.rows_T8.dtype == torch.float32
    assert table.rows_T8.shape == (1000, 8)
    for name, value in {
        "A": table.schedule.alpha,
        "B": table.schedule.sigma,
        "C": torch.zeros(1000, dtype=torch.float64),
        "D": torch.ones(1000, dtype=torch.float64),
        "W": table.weight,
    }.items():
        torch.testing.assert_close(column(table, name), value.float().double(), rtol=0, atol=0)
    assert torch.equal(table.time_T, torch.arange(1000, dtype=torch.float32))


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
def test_mean_gap_against_the_posterior(objective):
    """g * (f - target) is true posterior mean - model mean; computed here through the predicted x0."""
    table = make("linear", objective)
    schedule = table.schedule
    betas, alpha_bar = schedule.betas, schedule.alpha_bar
    assert betas is not None
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    x0, eps, error = torch.randn(
        3, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    x_t = schedule.alpha * x0 + schedule.sigma * eps
    target = table.objective.target_x0 * x0 + table.objective.target_eps * eps
    if objective == "epsilon":
        predicted = (x_t - schedule.sigma * (target + error)) / schedule.alpha
    elif objective == "x0":
        predicted = target + error
    else:
        predicted = schedule.alpha * x_t - schedule.sigma * (target + error)
    first = betas * previous.sqrt() / (1 - alpha_bar)
    second = (1 - betas).sqrt() * (1 - previous) / (1 - alpha_bar)
    truth, model = first * x0 + second * x_t, first * predicted + second * x_t
    truth[0] = x0[0]  # row 0 is decoded directly; its posterior mean is x0 already
    torch.testing.assert_close(
        column(table, "MEAN_GAP") * error, truth - model, rtol=1e-5, atol=1e-8
    )


def test_log_variances():
    table = make("cosine")
    betas, alpha_bar = table.schedule.betas, table.schedule.alpha_bar
    assert betas is not None
    low, high = column(table, "LOGVAR_MIN"), column(table, "LOGVAR_MAX")
    torch.testing.assert_close(high, betas.log(), rtol=1e-6, atol=1e-6)
    posterior = betas[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    torch.testing.assert_close(low[1:], posterior.log(), rtol=1e-6, atol=1e-6)
    assert low[0] == low[1]
    assert (low <= high).all()


def test_weights_can_be_normalised():
    table = make(normalise=True)
    assert (table.density * table.weight).sum().item() == pytest.approx(1, abs=1e-12)
    shape = table.weight / make().weight
    assert shape.std().item() == pytest.approx(0, abs=1e-12)


def test_weights_stated_for_eps_are_converted():
    eps = make("linear", "epsilon", weight_in="eps").weight
    v = make("linear", "v", weight_in="eps").weight
    snr = make().schedule.snr
    torch.testing.assert_close(eps, make().weight, rtol=1e-12, atol=0)
    torch.testing.assert_close(v, eps * snr / (snr + 1), rtol=1e-12, atol=0)
    torch.testing.assert_close(make("linear", "v").weight, eps, rtol=1e-12, atol=0)


def test_integer_cdf_is_the_rounded_sum():
    density = make().density
    cdf = integer_cdf(density)
    exact = (density.cumsum(0) * 2**32).round().long()
    assert cdf.dtype == torch.int64
    assert (cdf - exact).abs().max() <= 1
    assert cdf[-1] == 2**32
    assert (cdf.diff() > 0).all()


@pytest.mark.parametrize(
    "mass",
    [
        [1.0, 0, 0, 1e-30, 0, 1e-30],
        [1e-30, 1e-30, 1.0],
        [1.0, 1e-30, 1e-30],
        [0, 1e-30, 0, 1.0, 0, 0],
        [1.0],
        [1e-12] * 500 + [1.0] + [1e-12] * 500,
    ],
)
def test_integer_cdf_keeps_every_possible_row(mass):
    density = torch.tensor(mass, dtype=torch.float64)
    cdf = integer_cdf(density)
    units = torch.cat([cdf[:1], cdf.diff()])
    assert torch.equal(units > 0, density > 0)
    assert (units >= 0).all()
    assert cdf[-1] == 2**32


def test_foreign_alphas_cumprod():
    own = make(learned=False)
    foreign = StepTable.from_alphas_cumprod(own.schedule.alpha_bar)
    torch.testing.assert_close(foreign.rows_T8, own.rows_T8, rtol=1e-6, atol=1e-7)
    assert torch.equal(foreign.cdf_T, own.cdf_T)
    other = StepTable.from_alphas_cumprod(
        own.schedule.alpha_bar, {"kind": "speed", "lam": 0.5}, "v", learned_variance=True
    )
    assert (column(other, "W") == 0.5).all()
    with pytest.raises(ValueError, match="did you mean 'speed'"):
        StepTable.from_alphas_cumprod(own.schedule.alpha_bar, timesteps="sped")


def test_moving_to_a_device_keeps_the_recipe():
    table = make()
    assert torch.equal(table.to("cpu").rows_T8, table.rows_T8)


def test_a_table_is_told_in_one_line():
    alphas_cumprod = torch.linspace(0.999, 0.01, 50, dtype=torch.float64)
    table = StepTable.from_alphas_cumprod(alphas_cumprod, timesteps="p2")
    assert repr(table) == f"StepTable(p2 on {table.schedule.kind}, 50 rows, predicts epsilon, cpu)"
    assert "16384 rows, predicts flow, cpu" in repr(StepTable.from_flow())


@pytest.mark.parametrize("schedule", names("schedule"))
def test_a_table_can_be_pickled(schedule):
    objective = {"edm": "edm", "ve": "edm", "rectified_flow": "flow"}.get(schedule, "v")
    kind = "mode" if schedule == "rectified_flow" else "loss_second_moment"
    table = make(schedule, objective, kind, learned=False)
    again = pickle.loads(pickle.dumps(table))
    for name in ("rows_T8", "cdf_T", "time_T", "weight"):
        assert torch.equal(getattr(again, name), getattr(table, name))
    assert repr(again) == repr(table)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"timesteps": {"kind": "speed", "kk": 1}},
            r"unknown key timesteps\.kk.*; known here: .*tau",
        ),
        ({"timesteps": {"kind": "speed", "k": -1}}, r"^timesteps\.k: .* 1 \(given: -1\)$"),
        ({"timesteps": "sped"}, "did you mean 'speed'"),
        ({"objective": {"kind": "fdm", "multiplier": 0}}, r"^objective\.multiplier: "),
    ],
)
def test_a_librarys_mistake_is_one_sentence(settings, said):
    with pytest.raises(ConfigError, match=said) as told:
        StepTable.from_alphas_cumprod(
            torch.linspace(0.99, 0.01, 9, dtype=torch.float64), **settings
        )
    assert "\n" not in str(told.value)
