"""SpeeD, as in the paper, as released and on any schedule: golden values, thresholds, refusals."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "timesteps.json").read_text())["rows"]


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


@pytest.mark.parametrize(
    ("schedule", "threshold", "gain"),
    [
        ("linear", {"tau": 700}, 1.316),
        ("linear", {"r": 139}, 1.320),
        ("quadratic", {"r": 139}, 1.114),
        ("quadratic", {"tau": 700}, 1.316),
        ("cosine", {"r": 139}, 1.046),
        ("cosine", {"tau": 700}, 1.316),
    ],
)
def test_the_ceiling_of_the_idea(schedule, threshold, gain):
    """How much more often the steps inside are drawn than uniformly."""
    density = make("speed", schedule, **threshold).density
    assert 1000 * density[0].item() == pytest.approx(gain, abs=2e-3)


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


# As released.


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda row: row["schedule"])
def test_official_matches_golden_values(golden):
    method = make("speed_official", golden["schedule"], k=golden["k"], tau=golden["tau"])
    assert method.resolved["mirror_step"] == golden["official_mirror"]
    mass = method.density[700:].sum().item()
    assert mass == pytest.approx(golden["official_mass_above_tau"], abs=1e-9)
    for row, value in golden["official_weight"].items():
        assert method.weight[int(row)].item() == pytest.approx(value, abs=1e-9)
    paper = make("speed", golden["schedule"], k=golden["k"], tau=golden["tau"])
    expected = (paper.density * method.weight).sum().item()
    assert expected == pytest.approx(
        golden["official_expected_weight_under_paper_density"], abs=1e-9
    )


def test_official_density_of_the_linear_schedule():
    density = 1000 * make("speed_official").density
    parts = {
        (0, 1): 1.316,
        (1, 100): 1.750,
        (100, 360): 1.446,
        (360, 642): 1.316,
        (642, 700): 0.669,
        (700, 1000): 0.132,
    }
    for (start, end), mean in parts.items():
        assert density[start:end].mean().item() == pytest.approx(mean, abs=6e-4)


@pytest.mark.parametrize(
    ("k", "paper", "released"),
    [
        (1, 0.300, 0.150),
        (2, 0.1765, 0.0882),
        (5, 0.0789, 0.0395),
        (10, 0.0411, 0.0205),
        (25, 0.0169, 0.0084),
    ],
)
def test_tails_of_paper_and_release(k, paper, released):
    assert make("speed", k=k).density[700:].sum().item() == pytest.approx(paper, abs=6e-5)
    official = make("speed_official", k=k).density
    assert official[700:].sum().item() == pytest.approx(released, abs=6e-5)
    assert torch.equal(
        make("speed_official", k=k, mirror=False).density, make("speed", k=k).density
    )


def test_official_density_by_drawing_as_the_release_does():
    """Half a batch from eq. 3, its mirror image, cut to the batch size."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(make("speed").density, 500_001, replacement=True, generator=generator)
    dual = torch.where(drawn < 642, 642 - drawn, drawn - 642)
    steps = torch.cat([drawn, dual])[:1_000_000]
    found = torch.histc(steps.double(), 50, 0, 1000) / 1_000_000
    expected = make("speed_official").density.view(50, 20).sum(1)
    assert (found - expected).abs().max() < 1e-3


def test_release_baselines():
    min_snr, p2 = make("min_snr_speed_release"), make("p2")
    torch.testing.assert_close(min_snr.weight / p2.weight, torch.full((1000,), 5.0).double())
    log_normal = make("log_normal_speed_release").density
    assert int(log_normal.argmax()) == 348
    assert log_normal[700:].sum().item() == pytest.approx(5.4e-5, abs=5e-7)
    for kind in ("speed_official", "log_normal_speed_release", "clts_speed_release"):
        with pytest.raises(ValueError, match=f"{kind} is defined for numbered steps"):
            make(kind, "rectified_flow")


# On any schedule.


@pytest.mark.parametrize("schedule", ["linear", "continuous_vp", "edm", "ve", "rectified_flow"])
def test_pure_du_is_the_logistic_law_of_log_snr(schedule):
    """E_t[du/dt f] = E_{L ~ Logistic(0, 1)} f up to what the schedule's ends cut off."""
    on = make_schedule(schedule)
    method = make("speed_u", on, pure=True, k=1)
    level = torch.linspace(-3, 3, 13, dtype=torch.float64)
    found = torch.stack([method.density[on.log_snr <= edge].sum() for edge in level])
    assert (found - level.sigmoid()).abs().max() < 5e-3


@pytest.mark.parametrize("schedule", ["cosine", "continuous_vp", "edm", "rectified_flow"])
def test_the_identity_integral(schedule):
    on = make_schedule(schedule)
    density = make("speed_u", on, pure=True, k=1).density

    def f(log_snr):
        return torch.exp(-((log_snr - 1) ** 2) / 8)

    # E_{u ~ U(0,1)} f(ln((1-u)/u)) on a fine grid of u, the same number for every schedule
    u = (torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**20
    assert f(-torch.logit(u)).mean().item() == pytest.approx(0.70435, abs=5e-6)
    assert (density * f(on.log_snr)).sum().item() == pytest.approx(0.70435, abs=3e-3)


def test_speed_u_uses_its_threshold_everywhere():
    assert make("speed_u", "cosine").tau == 945
    flow = make_schedule("rectified_flow")
    tau = make("speed_u", flow).tau
    assert tau is not None
    assert flow.coordinate[tau].item() == pytest.approx(0.9216, abs=2e-4)
    edm = make_schedule("edm")
    tau = make("speed_u", edm).tau
    assert tau is not None
    assert edm.sigma[tau].item() == pytest.approx(0.5 * 138**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="scaled_linear never reaches r=1000"):
        make("speed_u", "scaled_linear", r=1000)
    assert make("speed_u", "scaled_linear", r=1000, k=1).tau is None


def test_speed_counts_no_steps_in_continuous_time():
    with pytest.raises(ValueError, match=r"give timesteps\.r instead"):
        make("speed", "edm", tau=700)
    assert make("speed", "continuous_vp").tau is not None


def test_suppression_of_edms_noise_levels():
    """At r = 139 and k = 5 SpeeD moves only 0.67 % -> 0.13 % of EDM's mass; at r = 10, 9.0 % -> 2.0 %."""
    edm = make_schedule("edm")
    for r, before, after in ((139, 0.00665, 0.0013), (10, 0.0904, 0.0195)):
        row = edm.first_row(r)
        plain = make("log_normal", edm).density[row:].sum().item()
        assert plain == pytest.approx(before, rel=2e-2)
        speed = {"kind": "speed_u", "r": r, "change_aware": "off"}
        combined = make("combine", edm, parts=["log_normal", speed]).density[row:].sum().item()
        assert combined == pytest.approx(after, rel=4e-2)
