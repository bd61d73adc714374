"""Schedules against golden numbers, and the paper's theory against the true schedules."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from speed_engine import kinds
from speed_engine.schedules import Schedule, from_alphas_cumprod, from_betas
from speed_engine.schedules.theory import increments
from speed_engine.schedules.theory.linear_ddpm import LinearDDPM
from speed_engine.step_table import build_step_table

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "timesteps.json").read_text())["rows"]
DISCRETE = ("linear", "quadratic", "cosine", "scaled_linear")


def make(kind: str, **options) -> Schedule:
    module = importlib.import_module(f"speed_engine.schedules.{kind}")
    return module.build(module.Config(**options))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda row: row["schedule"])
def test_golden_values(golden):
    schedule = make(golden["schedule"])
    for name in ("alpha_bar", "log_snr"):
        column = getattr(schedule, name)
        for row, value in golden[name].items():
            assert column[int(row)].item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert increments.peak_row(schedule) == golden["gradient_peak"]
    assert schedule.first_row(golden["r"]) == golden["tau_from_r"]


@pytest.mark.parametrize(
    ("kind", "end", "peak", "rate", "snr", "taus", "at_700"),
    [
        ("linear", 4.04e-5, 219, 0.00271, 1.53, (475, 620, 697, 825), 0.0069),
        ("quadratic", 7.33e-4, 411, 0.00212, 1.06, (660, 802, 872, 984), 0.0667),
        ("cosine", 2.4e-9, 495, 0.00156, 1.00, (793, 908, 945, 979), 0.2019),
        ("scaled_linear", 4.66e-3, 313, 0.00168, 1.32, (674, 866, 963, None), 0.0825),
    ],
)
def test_properties_of_discrete_schedules(kind, end, peak, rate, snr, taus, at_700):
    schedule = make(kind)
    assert schedule.alpha_bar[-1].item() == pytest.approx(end, rel=2e-2)
    assert schedule.alpha_bar[700].item() == pytest.approx(at_700, abs=6e-5)
    assert schedule.noise_rate[peak].item() == pytest.approx(rate, abs=6e-6)
    assert schedule.snr[peak].item() == pytest.approx(snr, abs=6e-3)
    for r, tau in zip((10, 50, 139, 1000), taus, strict=True):
        if tau is None:
            with pytest.raises(ValueError, match=r"scaled_linear never reaches r=1000.*214\.6"):
                schedule.first_row(r)
        else:
            assert schedule.first_row(r) == tau


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("num_steps", [30, 1000, 4000])
def test_discrete_schedules_are_variance_preserving(kind, num_steps):
    schedule = make(kind, num_steps=num_steps)
    assert schedule.num_rows == num_steps
    assert not schedule.continuous
    torch.testing.assert_close(
        schedule.alpha.square() + schedule.sigma.square(), torch.ones_like(schedule.alpha)
    )
    assert (schedule.alpha_bar.diff() < 0).all()
    torch.testing.assert_close(schedule.noise_fraction, 1 - schedule.alpha_bar, rtol=0, atol=1e-15)
    assert schedule.alpha_bar[-1] < 0.02  # noise at the end whatever the number of steps


def test_betas_of_linear_are_ddpms():
    betas = make("linear").betas
    assert betas is not None
    assert betas[0].item() == pytest.approx(1e-4)
    assert betas[-1].item() == pytest.approx(0.02)
    assert make("linear", num_steps=100).betas[-1].item() == pytest.approx(0.2)
    assert make("linear", num_steps=100, beta_end=0.02).betas[-1].item() == pytest.approx(0.02)


@pytest.mark.parametrize("kind", DISCRETE)
def test_zero_terminal_snr(kind):
    plain, rescaled = make(kind), make(kind, zero_terminal_snr=True)
    assert rescaled.alpha[-1] == 0
    assert rescaled.alpha[0].item() == pytest.approx(plain.alpha[0].item(), rel=1e-12)
    assert rescaled.snr[-1] == 0
    assert rescaled.betas is not None
    assert ((rescaled.betas > 0) & (rescaled.betas <= 1)).all()


def test_foreign_schedules_are_rebuilt():
    linear = make("linear")
    again = from_alphas_cumprod(linear.alpha_bar)
    torch.testing.assert_close(again.betas, linear.betas, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(again.sigma, linear.sigma, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "values", [[0.9], [0.5, 0.9], [0.9, 0.5, 0.0, 0.0], [1.0, 0.5], [[0.9, 0.5]]]
)
def test_foreign_schedules_are_checked(values):
    with pytest.raises(ValueError, match="alphas_cumprod must be"):
        from_alphas_cumprod(torch.tensor(values))


def test_impossible_betas_are_refused():
    with pytest.raises(ValueError, match="betas must be"):
        from_betas("mine", torch.tensor([0.1, 1.5]))
    with pytest.raises(ValueError, match=r"r=0\.5 must be above 1"):
        make("linear").first_row(0.5)


def test_names_are_the_files():
    assert set(DISCRETE) <= set(kinds.names("schedule"))
    assert "theory" not in kinds.names("schedule")


# The paper's statements on linear DDPM. Row j of a table is the paper's t = j + 1.


def test_theorem_1_bounds_hold_on_the_true_schedule():
    theory, schedule = LinearDDPM(), make("linear")
    alpha_bar, psi = schedule.alpha_bar.tolist(), increments.psi(schedule).tolist()
    gaps = [theory.alpha_bar_bound(t) - alpha_bar[t - 1] for t in range(1, 1001)]
    assert min(gaps) >= 0
    assert max(gaps) == pytest.approx(0.0023, abs=6e-5)
    assert gaps.index(max(gaps)) + 1 == 297
    # with t (t + 1) in the exponent, as the proof has it on the way, the bound is tighter
    tighter = [
        theory.alpha_bar_bound(t) * math.exp(-theory.delta * t / 2000) - alpha_bar[t - 1]
        for t in range(1, 1001)
    ]
    assert min(tighter) >= 0
    assert max(tighter) == pytest.approx(0.0012, abs=6e-5)
    slack = [psi[t - 1] - theory.psi_hat(t) for t in range(1, 1000)]
    assert min(slack) >= 0
    assert max(slack) == pytest.approx(0.0071, abs=6e-5)
    mean = increments.mean_factor(schedule).square().tolist()
    assert all(mean[t - 1] <= theory.phi_hat(t) for t in range(1, 1000))


def test_psi_is_the_papers_formula():
    schedule = make("linear")
    assert schedule.betas is not None
    direct = 2 - schedule.alpha_bar[:-1] * (1 + 1 - schedule.betas[1:])
    torch.testing.assert_close(increments.psi(schedule), direct, rtol=0, atol=1e-14)


def test_psi_is_not_the_markov_variance():
    schedule = make("linear")
    psi, markov = increments.psi(schedule), increments.markov_variance(schedule)
    assert psi[219].item() == pytest.approx(0.793, abs=6e-4)
    assert markov[219].item() == pytest.approx(0.00448, abs=3e-5)
    assert psi[800].item() == pytest.approx(1.997, abs=6e-4)
    assert markov[800].item() == pytest.approx(0.0161, abs=6e-5)


def test_markov_variance_by_simulation():
    generator = torch.Generator().manual_seed(0)
    schedule = make("linear")
    assert schedule.betas is not None
    eps, fresh = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    x = schedule.sigma[219] * eps
    beta = schedule.betas[220]
    increment = (1 - beta).sqrt() * x + beta.sqrt() * fresh - x
    expected = increments.markov_variance(schedule)[219].item()
    assert increment.var().item() == pytest.approx(expected, rel=0.02)


def test_psi_rate_and_the_peak():
    theory, schedule = LinearDDPM(), make("linear")
    rates = [theory.psi_hat_rate(t) for t in range(1, 1001)]
    assert max(rates) == pytest.approx(0.00541, abs=6e-6)
    assert theory.t_acceleration_end() == pytest.approx(220.1, abs=0.05)
    true = increments.psi_rate(schedule)
    assert int(true.argmax()) + 1 == 220
    torch.testing.assert_close(true, 2 * schedule.noise_rate, rtol=1e-9, atol=1e-12)


def test_increments_of_edm():
    """Psi = (t + dt)^2 + t^2 and its rate 2 [(t + dt) + t] (the paper's text has the factor 2 in the wrong one)."""
    schedule = make("edm")
    t = schedule.sigma / schedule.alpha
    assert torch.equal(schedule.alpha, torch.ones_like(t))
    torch.testing.assert_close(increments.psi(schedule), t[1:] ** 2 + t[:-1] ** 2)
    (speed,) = torch.gradient(t, spacing=(schedule.coordinate,))
    inner = slice(5, -5)
    torch.testing.assert_close(
        increments.psi_rate(schedule)[inner], (4 * t * speed)[inner], rtol=1e-2, atol=0
    )


@pytest.mark.parametrize(
    ("r", "closed", "numeric"),
    [
        (2, 259.9, 259),
        (math.e, 313.0, 312),
        (5, 398.2, 396),
        (10, 477.0, 475),
        (20, 544.7, 542),
        (50, 623.0, 620),
        (100, 676.3, 673),
        (138.6, 700.0, 697),
        (200, 725.7, 723),
        (500, 786.3, 783),
        (1000, 829.2, 825),
        (1e4, 958.1, 954),
    ],
)
def test_tau_of_r_closed_and_numeric(r, closed, numeric):
    theory = LinearDDPM()
    assert theory.tau(r) == pytest.approx(closed, abs=0.051)
    assert theory.r_hat(theory.tau(r)) == pytest.approx(r, rel=1e-9)
    assert make("linear").first_row(r) == numeric


def test_the_printed_r_hat_lacks_a_2():
    theory = LinearDDPM()
    assert theory.r_hat(700) == pytest.approx(138.6, abs=0.05)
    as_printed = math.exp((theory.beta_zero + theory.delta * 700 / 1000) * 700)
    assert as_printed == pytest.approx(18162, rel=1e-4)


def test_growth_of_the_noise_fraction_in_closed_form():
    """du/d ln sigma = 2 u (1 - u); VP: beta exp(-B); flow: 2 t (1 - t) / (t^2 + (1 - t)^2)^2."""
    for kind in ("edm", "ve"):
        on = make(kind)
        expected = 2 * on.noise_fraction * (1 - on.noise_fraction)
        torch.testing.assert_close(on.noise_rate[1:-1], expected[1:-1], rtol=0, atol=1e-6)
    vp, flow = make("continuous_vp"), make("rectified_flow")
    t = vp.coordinate
    expected = (0.1 + 19.9 * t) * torch.exp(-(0.1 * t + 19.9 * t.square() / 2))
    torch.testing.assert_close(vp.noise_rate[1:-1], expected[1:-1], rtol=0, atol=1e-6)
    t = flow.coordinate
    expected = 2 * t * (1 - t) / (t.square() + (1 - t).square()).square()
    torch.testing.assert_close(flow.noise_rate[1:-1], expected[1:-1], rtol=0, atol=1e-6)


def test_literal_increments_of_exploding_noise_have_no_areas():
    """With sigma^2 = t (VE) the variance grows at a constant rate, with sigma = t (EDM) ever faster."""
    sigma = make("edm").sigma
    time_of_ve, time_of_edm = sigma.square(), sigma
    ve = torch.gradient(sigma.square(), spacing=(time_of_ve,))[0]
    edm = torch.gradient(sigma.square(), spacing=(time_of_edm,))[0]
    torch.testing.assert_close(ve, torch.ones_like(ve))
    assert (edm.diff() > 0).all()


def test_equal_mass_cells():
    """A continuous schedule moved to the quantiles of a density."""
    flow = make("rectified_flow", num_cells=1000)
    density = 2 * flow.coordinate / 1000  # p(t) = 2 t, quantile sqrt
    moved = flow.equal_mass(density / density.sum())
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    torch.testing.assert_close(moved.coordinate, middles.sqrt(), rtol=0, atol=1e-3)
    torch.testing.assert_close(moved.measure.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(moved.sigma, moved.coordinate)


def test_resolution_shift():
    plain, shifted = make("rectified_flow"), make("rectified_flow", shift=3)
    t = plain.coordinate
    torch.testing.assert_close(shifted.sigma, 3 * t / (1 + 2 * t))
    torch.testing.assert_close(shifted.time, 1000 * shifted.sigma)


def test_areas():
    division = increments.areas(make("linear"), tau=700)
    assert [division.of_row(row) for row in (0, 218, 219, 699, 700, 999)] == [
        "acceleration",
        "acceleration",
        "deceleration",
        "deceleration",
        "convergence",
        "convergence",
    ]
    assert division.shares(make("linear").share_edges) == pytest.approx(
        {"acceleration": 0.219, "deceleration": 0.481, "convergence": 0.3}
    )
    plain = {kind: make(kind) for kind in DISCRETE}
    shares = {
        kind: increments.areas(one, r=138.6).shares(one.share_edges)["convergence"]
        for kind, one in plain.items()
    }
    assert shares == pytest.approx(
        {"linear": 0.303, "quadratic": 0.128, "cosine": 0.055, "scaled_linear": 0.038}
    )
    with pytest.raises(ValueError, match="exactly one"):
        increments.areas(make("linear"))


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "laplace"])
def test_the_rate_of_rectified_flow_is_the_formula(density):
    """du/dt = 2 t (1 - t) / (t^2 + (1 - t)^2)^2, 0 at both ends, at rows near together or far apart."""
    table = build_step_table(
        kinds.config_of("schedule", "rectified_flow"),
        kinds.config_of("objective", "flow"),
        kinds.config_of("timesteps", density),
    )
    on = table.schedule
    t = on.coordinate
    exact = 2 * t * (1 - t) / (t.square() + (1 - t).square()).square()
    torch.testing.assert_close(on.noise_rate, exact, rtol=1e-5, atol=1e-5)
    plain = on.unmoved
    assert plain.num_rows == on.num_rows and plain.unmoved is plain
    assert plain.noise_rate[0] < 3e-4 and plain.noise_rate[-1] < 3e-4
    assert increments.psi(plain)[-1].item() == pytest.approx(2.0, abs=3e-4)
    assert on.ratio_range == plain.ratio_range
    torch.testing.assert_close(increments.psi_rate(on), 4 * t, rtol=1e-12, atol=0)


def test_the_shift_of_rectified_flow_follows_the_shape_of_a_sample():
    """s = sqrt(C H W / 4096): 6.93 for the 768 x 16 x 16 latents of a representation autoencoder."""
    module = importlib.import_module("speed_engine.schedules.rectified_flow")
    auto = module.Config(shift="auto")
    assert auto.for_shape((768, 16, 16)).shift == pytest.approx(48**0.5)
    assert auto.for_shape((4, 32, 32)) == module.Config(shift=1)
    assert module.Config(shift=3).for_shape((768, 16, 16)).shift == 3
    s, t = 0.125, torch.linspace(0.1, 0.9, 5, dtype=torch.float64)  # 8 x 8 grey pixels
    built = module.build(auto.for_shape((1, 8, 8)))
    assert built.curve is not None
    torch.testing.assert_close(built.curve(t)[1], s * t / (1 + (s - 1) * t))
    with pytest.raises(ValueError, match=r"schedule\.shift=auto is known once"):
        module.build(auto)
    with pytest.raises(ValueError, match="shift"):
        module.Config(shift="big")
