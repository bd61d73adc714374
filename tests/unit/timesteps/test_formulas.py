"""The other fixed methods against their formulas and published numbers."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, beta

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "timesteps.json").read_text())["rows"]


def make_schedule(kind: str, **options) -> Schedule:
    module = importlib.import_module(f"speed_engine.schedules.{kind}")
    return module.build(module.Config(**options))


def make(kind: str, schedule: str | Schedule = "linear", **options) -> Method:
    module = importlib.import_module(f"speed_engine.timesteps.{kind}")
    if isinstance(schedule, str):
        schedule = make_schedule(schedule)
    return module.build(module.Config(**options), schedule)


def weight_on(target: str, method: Method, schedule: Schedule) -> torch.Tensor:
    objective = importlib.import_module(f"speed_engine.objectives.{target}")
    gain = objective.build(objective.Config(), schedule).gain(schedule)
    return method.own_weight(gain, schedule.alpha / schedule.sigma)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda row: row["schedule"])
def test_weights_match_golden_values(golden):
    schedule = make_schedule(golden["schedule"])
    columns = {
        "min_snr_eps": weight_on("epsilon", make("min_snr", schedule), schedule),
        "min_snr_v": weight_on("v", make("min_snr", schedule), schedule),
        "p2_eps": weight_on("epsilon", make("p2", schedule), schedule),
    }
    for name, column in columns.items():
        for row, value in golden[name].items():
            assert column[int(row)].item() == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["p2", "min_snr", "soft_min_snr", "debiased", "truncated_snr"])
def test_weights_of_all_targets(kind):
    """The table of the three targets: W_eps = W_x0 / SNR, W_v = W_x0 / (SNR + 1)."""
    schedule = make_schedule("linear")
    snr = schedule.snr
    x0 = {
        "p2": snr / (1 + snr),
        "min_snr": snr.clamp(max=5),
        "soft_min_snr": snr / (1 + snr),
        "debiased": snr.sqrt(),
        "truncated_snr": snr.clamp(min=1),
    }[kind]
    method = make(kind, schedule)
    torch.testing.assert_close(weight_on("x0", method, schedule), x0, rtol=1e-9, atol=0)
    torch.testing.assert_close(weight_on("epsilon", method, schedule), x0 / snr, rtol=1e-9, atol=0)
    torch.testing.assert_close(weight_on("v", method, schedule), x0 / (snr + 1), rtol=1e-9, atol=0)
    assert torch.equal(method.density, schedule.uniform)


def test_min_snr_crosses_gamma_at_130_and_is_1_at_zero_snr():
    weight = weight_on("epsilon", make("min_snr"), make_schedule("linear"))
    assert int((weight < 1).sum()) == 130
    terminal = make_schedule("linear", zero_terminal_snr=True)
    for target in ("v", "x0"):
        assert weight_on(target, make("min_snr", terminal), terminal)[-1] == 1


def test_debiased_cap_acts_on_the_clean_end_only():
    schedule = make_schedule("linear")
    plain = weight_on("epsilon", make("debiased", schedule), schedule)
    capped = weight_on("epsilon", make("debiased", schedule, max_snr=1000), schedule)
    assert capped[0].item() == pytest.approx(1000**-0.5)
    torch.testing.assert_close(plain[50:], capped[50:])


def test_edm_weights():
    schedule = make_schedule("edm")
    method = make("edm", schedule)
    one = torch.ones_like(schedule.alpha)
    torch.testing.assert_close(weight_on("edm", method, schedule), one)
    eps = weight_on("epsilon", method, schedule)
    torch.testing.assert_close(eps, 1 + schedule.sigma.square() / 0.25)
    data = weight_on("x0", method, schedule)
    expected = (schedule.sigma.square() + 0.25) / (schedule.sigma * 0.5).square()
    torch.testing.assert_close(data, expected)


@pytest.mark.parametrize(
    ("kind", "options", "quantiles", "tail"),
    [
        ("log_normal", {}, (21, 78, 171, 317, 541), 0.0064),
        ("log_normal", {"mean": -0.4, "std": 1.0}, (75, 190, 316, 450, 619), 0.0143),
        ("logit_normal", {}, (161, 337, 500, 662, 838), 0.198),
        ("logit_normal", {"by": "log_snr"}, (55, 147, 258, 392, 571), 0.0065),
        ("log_normal_speed_release", {}, (140, 252, 335, 414, 515), 5.4e-5),
    ],
)
def test_quantiles_on_linear_ddpm(kind, options, quantiles, tail):
    density = make(kind, **options).density
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    found = torch.searchsorted(density.cumsum(0), levels).tolist()
    assert all(abs(a - b) <= 1 for a, b in zip(found, quantiles, strict=True))
    assert density[700:].sum().item() == pytest.approx(tail, rel=1e-2)


def test_tails_of_other_densities():
    assert make("beta").density[700:].sum().item() == pytest.approx(0.248, abs=5e-4)
    assert make("laplace").density[700:].sum().item() == pytest.approx(2.4e-5, rel=2e-2)
    flow, edm = make_schedule("rectified_flow"), make_schedule("edm")
    tail = make("logit_normal", flow).density[flow.first_row(139) :].sum().item()
    assert tail == pytest.approx(0.0069, abs=5e-5)
    for mean, std, mass in ((-1.2, 1.2, 0.00665), (-0.4, 1.0, 0.015), (-0.8, 1.6, 0.054)):
        density = make("log_normal", edm, mean=mean, std=std).density
        assert density[edm.first_row(139) :].sum().item() == pytest.approx(mass, rel=1.5e-2)


@pytest.mark.parametrize("by", ["log_snr", "sigma"])
def test_the_mappings_of_logit_normal_agree_on_flow(by):
    flow = make_schedule("rectified_flow")
    index, other = make("logit_normal", flow), make("logit_normal", flow, by=by)
    assert (index.density - other.density).abs().sum() < 1e-4


@pytest.mark.parametrize(("a", "b"), [(0.8, 1.0), (1.0, 1.0), (2.0, 3.0), (0.3, 0.4), (5.0, 0.9)])
def test_beta_mass_against_the_gamma_function(a, b):
    edges = torch.linspace(0, 1, 101, dtype=torch.float64)
    mass = beta.beta_mass(edges, a, b)
    whole = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    assert mass.sum().item() == pytest.approx(whole, rel=1e-9)
    if b == 1:
        torch.testing.assert_close(mass, edges.pow(a).diff() / a, rtol=1e-9, atol=0)


def test_mode_by_drawing():
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(1_000_000, dtype=torch.float64, generator=generator)
    t = 1 - u - 1.29 * ((math.pi * u / 2).cos().square() - 1 + u)
    found = torch.histc(t, 50, 0, 1) / 1_000_000
    expected = make("mode").density.view(50, 20).sum(1)
    assert (found - expected).abs().max() < 1e-3


def test_laplace_and_cauchy_follow_their_laws():
    flow = make_schedule("rectified_flow")
    for edge in (-2.0, -0.3, 0.0, 0.7, 2.5):
        below = flow.log_snr <= edge
        laplace = 0.5 * math.exp(edge / 0.5) if edge < 0 else 1 - 0.5 * math.exp(-edge / 0.5)
        assert make("laplace", flow).density[below].sum().item() == pytest.approx(laplace, abs=1e-3)
        cauchy = math.atan(edge / 0.5) / math.pi + 0.5
        assert make("cauchy", flow).density[below].sum().item() == pytest.approx(cauchy, abs=1e-2)


def test_the_bell_weight_of_the_flow_trainers():
    """y = exp(-2 ((t - T/2) / T)^2), w = (y - min y) T / sum, at T = 1000 steps."""
    t = torch.arange(1000, dtype=torch.float64) + 0.5
    y = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    expected = (y - y.min()) * 1000 / (y - y.min()).sum()
    torch.testing.assert_close(make("bell").weight, expected)
    flow = make_schedule("rectified_flow", num_cells=1000, shift=3)
    torch.testing.assert_close(make("bell", flow).weight, expected)
    assert torch.equal(make("bell", flow).density, flow.uniform)
    moved = flow.equal_mass(make("logit_normal", flow).density)  # the weight follows the rows
    middle, weight = moved.num_rows // 2, make("bell", moved).weight
    assert weight[middle].item() == pytest.approx(expected[500].item(), rel=1e-5)


def test_combinations():
    schedule = make_schedule("linear")
    combined = make("combine", schedule, parts=["log_normal", {"kind": "min_snr", "gamma": 3}])
    torch.testing.assert_close(combined.density, make("log_normal", schedule).density)
    assert [part.weight_in for part in combined.parts] == ["own", "x0"]
    torch.testing.assert_close(combined.parts[1].weight, schedule.snr.clamp(max=3))
    for parts, message in (
        ([], "must list the methods"),
        (["speed", "sped"], "did you mean 'speed'"),
        ([{"kind": "combine", "parts": ["speed"]}], "another combine"),
        ([{"kind": "speed", "normalise": True}], "have no effect in a part"),
        (["adaptive", "log_normal"], "adaptive draws by itself"),
    ):
        with pytest.raises(ValueError, match=message):
            make("combine", schedule, parts=parts)


def test_a_density_that_misses_the_schedule_is_refused():
    with pytest.raises(ValueError, match="not positive and finite"):
        make("log_normal", mean=60, std=0.1)
