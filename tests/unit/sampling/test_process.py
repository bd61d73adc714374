"""Samplers against ideal denoisers of Gaussian data, improved-diffusion's formula, diffusers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_engine.conditions import Condition
from speed_engine.conditions import label as label_file
from speed_engine.objectives import Objective
from speed_engine.sampling.ddpm import ancestral_step
from speed_engine.sampling.guidance import guided
from speed_engine.sampling.process import Process, Recipe, sample
from speed_engine.schedules import Schedule, cells, from_alphas_cumprod, on_curve

LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
COSINE = np.cumprod(
    1
    - np.minimum(
        0.999,
        1
        - np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        / np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2,
    )
)
SHAPE = (1, 2, 2)
MEAN = torch.tensor([0.5, -0.3, 0.0, 0.8], dtype=torch.float64)
FACTOR = torch.tensor(
    [[0.6, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.1, 0.5, 0], [0, 0, 0.3, 0.2]], dtype=torch.float64
)
COVARIANCE = FACTOR @ FACTOR.T


def labelled(num: int, dropout: float = 0.1) -> dict[str, Condition]:
    """A class of `num`, with a null label where it is dropped."""
    config = label_file.Config(dropout=dropout)
    return {"label": label_file.build(config, "label", label_file.described(num))}


def process(objective="epsilon", alpha_bar=LINEAR, **changes) -> Process:
    def on(schedule: Schedule) -> Objective:
        zero, one = torch.zeros_like(schedule.alpha), torch.ones_like(schedule.alpha)
        columns = {
            "epsilon": (zero, one),
            "x0": (one, zero),
            "v": (-schedule.sigma, schedule.alpha),
        }
        return Objective(objective, *columns[objective], one)

    schedule = from_alphas_cumprod(torch.from_numpy(np.asarray(alpha_bar)))
    facts = {"learned_variance": False, "shape": SHAPE, **changes}
    return Process(schedule, on, **facts)


def kept_steps(process: Process, recipe: Recipe) -> np.ndarray:
    """The time steps that are visited; the network is told their numbers."""
    return process.levels(recipe).time.astype(int)


class GaussianDenoiser:
    """The ideal network for x0 ~ N(MEAN + shift of the label, COVARIANCE)."""

    def __init__(self, objective="epsilon", alpha_bar=LINEAR, shifts=None) -> None:
        self.objective, self.alpha_bar, self.shifts = objective, alpha_bar, shifts
        self.calls: list[int] = []

    def __call__(self, x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls.append(len(x))
        a = float(self.alpha_bar[int(tau[0])])
        mean = MEAN if label is None or self.shifts is None else MEAN + self.shifts[label][:, None]
        flat = x.flatten(1).double()
        gain = math.sqrt(a) * COVARIANCE @ torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(4))
        x0 = mean + (flat - math.sqrt(a) * mean) @ gain.T
        eps = (flat - math.sqrt(a) * x0) / math.sqrt(1 - a)
        v = math.sqrt(a) * eps - math.sqrt(1 - a) * x0
        out = {"epsilon": eps, "x0": x0, "v": v}[self.objective]
        return out.reshape(x.shape).to(x.dtype)


def check_moments(x: Tensor, mean: Tensor, tolerance: float) -> None:
    flat = x.flatten(1).double()
    torch.testing.assert_close(flat.mean(0), mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.cov(flat.T), COVARIANCE, rtol=0, atol=tolerance)


@pytest.mark.parametrize("objective", ["epsilon", "x0", "v"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 200), ("ddim", 100), ("dpm++", 25)])
def test_ideal_denoiser_gives_the_data_distribution(
    sampler: str, steps: int, objective: str
) -> None:
    model = GaussianDenoiser(objective)
    recipe = Recipe(sampler=sampler, steps=steps, seed=3)
    x = sample(model, process(objective), recipe, numbers=range(6000), batch_size=6000)
    assert x.shape == (6000, *SHAPE) and x.dtype == torch.float32
    assert model.calls == [6000] * steps
    check_moments(x, MEAN, 0.035)  # 4 standard errors of a mean: 0.033


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_cosine_schedule_with_an_epsilon_model(sampler: str) -> None:
    """alpha_bar ends at 2e-9 there; float32 epsilon carries too little of x0 to start from it."""
    x = sample(
        GaussianDenoiser(alpha_bar=COSINE),
        process(alpha_bar=COSINE),
        Recipe(sampler=sampler, steps=50),
        numbers=range(6000),
        batch_size=6000,
    )
    check_moments(x, MEAN, 0.035)


def flow_on(schedule: Schedule) -> Objective:
    """Velocity eps - x0."""
    one = torch.ones_like(schedule.alpha)
    return Objective("flow", -one, one, one)


def edm_on(schedule: Schedule) -> Objective:
    """EDM's preconditioning at sigma_data 0.5, c_out F + c_skip x."""
    s = schedule.sigma
    root = (s.square() + 0.25).sqrt()
    c = (1 - 0.25 / root.square()) / (0.5 * s / root)
    d = -(0.25 / root.square()) * s / (0.5 * s / root)
    return Objective("edm", c, d, 1 / root)


def continuous(kind: str) -> Process:
    """Rectified flow and an EDM-like variance-exploding process, with one output to predict."""
    if kind == "flow":  # x_t = (1 - t) x0 + t eps
        flow = on_curve("flow", lambda t: (1 - t, t, 1000 * t), *cells(0.0, 1.0, 2000))
        return Process(flow, flow_on, False, SHAPE)
    ends = (math.log(0.002), math.log(80), 2000)
    ve = on_curve("ve", lambda c: (torch.ones_like(c), c.exp(), c / 4), *cells(*ends))
    return Process(ve, edm_on, False, SHAPE)


@pytest.mark.parametrize("kind", ["flow", "edm"])
@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddpm", 250), ("ddim", 150), ("dpm++", 40), ("heun", 20)]
)
def test_any_schedule_and_objective(sampler: str, steps: int, kind: str) -> None:
    """Not variance preserving, input scaled, target mixed of x0 and eps: the same distribution."""
    facts = continuous(kind)
    assert facts.schedule.curve is not None

    def model(inputs: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
        coordinate = tau[:1].double() / 1000 if kind == "flow" else 4 * tau[:1].double()
        level = on_curve(kind, facts.schedule.curve, coordinate, torch.zeros(1))
        objective, a, s = facts.objective_on(level), level.alpha, level.sigma
        x = inputs.double().flatten(1) / objective.input_scale
        gain = a * COVARIANCE @ torch.linalg.inv(a * a * COVARIANCE + s * s * torch.eye(4))
        x0 = MEAN + (x - a * MEAN) @ gain.T
        target = objective.target_x0 * x0 + objective.target_eps * (x - a * x0) / s
        return target.reshape(inputs.shape).to(inputs.dtype)

    recipe = Recipe(sampler=sampler, steps=steps)
    x = sample(model, facts, recipe, numbers=range(6000), batch_size=6000)
    check_moments(x, MEAN, 0.045)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("objective", ["epsilon", "v"])
def test_zero_terminal_snr(sampler: str, objective: str) -> None:
    bar = LINEAR.copy()
    bar[-1] = 0
    steps = 25 if sampler == "dpm++" else 200
    recipe = Recipe(sampler=sampler, steps=steps)
    facts = process(objective, bar)
    assert kept_steps(facts, recipe)[-1] == (999 if objective == "v" else 998)
    model = GaussianDenoiser(objective, bar)
    x = sample(model, facts, recipe, numbers=range(6000), batch_size=6000)
    check_moments(x, MEAN, 0.035)


def test_learned_variance_makes_few_steps_exact() -> None:
    """With the true variance of p(x_{t-1} | x_t), Gaussian data survive even 12 ancestral steps."""
    std = 0.7
    facts = process(learned_variance=True)
    recipe = Recipe(sampler="ddpm", steps=12)
    kept = kept_steps(facts, recipe).tolist()

    def model(x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
        t = int(tau[0])
        place = kept.index(t)
        a, a_previous = LINEAR[t], LINEAR[kept[place - 1]] if place else 1.0
        x0 = math.sqrt(a) * std**2 / (a * std**2 + 1 - a) * x
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        beta, var_previous = 1 - a / a_previous, a_previous * std**2 + 1 - a_previous
        var = var_previous * beta / (a * std**2 + 1 - a)
        low = beta * max(1 - a_previous, 1e-20) / (1 - a)
        fraction = (math.log(var) - math.log(low)) / (math.log(beta) - math.log(low))
        return torch.cat([eps, torch.full_like(x, 2 * fraction - 1)], dim=1)

    numbers = range(20000)
    x = sample(model, facts, recipe, numbers=numbers, batch_size=20000)
    assert abs(x.std().item() - std) < 0.004  # 80,000 values: one standard error is 0.0018

    def without(x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
        return model(x, tau, label)[:, :1]

    fixed = sample(without, process(), recipe, numbers=numbers, batch_size=20000)
    assert (
        fixed.std().item() < std - 0.02
    )  # the posterior variance alone is too small: not the same


def improved_diffusion_step(x, eps, v, noise, kept, place, bar):
    """Learned-variance ancestral step on respaced betas, in the order of improved-diffusion."""
    betas = [1 - bar[kept[0]]] + [1 - bar[k] / bar[p] for p, k in itertools.pairwise(kept)]
    betas = np.array(betas)
    cumulative = np.cumprod(1 - betas)
    previous = np.append(1.0, cumulative[:-1])
    variance = betas * (1 - previous) / (1 - cumulative)
    clipped = np.log(np.append(variance[1], variance[1:]))
    c1 = betas * np.sqrt(previous) / (1 - cumulative)
    c2 = (1 - previous) * np.sqrt(1 - betas) / (1 - cumulative)
    x0 = np.sqrt(1 / cumulative[place]) * x - np.sqrt(1 / cumulative[place] - 1) * eps
    fraction = (v + 1) / 2
    log_variance = fraction * np.log(betas[place]) + (1 - fraction) * clipped[place]
    mean = c1[place] * x0 + c2[place] * x
    return mean + (place != 0) * torch.exp(0.5 * log_variance) * noise


def learned_step(x, eps, v, noise, kept, place, bar):
    a, a_previous = float(bar[kept[place]]), float(bar[kept[place - 1]]) if place else 1.0
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    return ancestral_step(x, x0, (v + 1) / 2, noise if place else None, a, a_previous)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1000, 250, 30])
@pytest.mark.parametrize("bar", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ancestral_step_is_improved_diffusions_and_diffusers(bar, steps: int, spacing: str) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    kept = kept_steps(process(alpha_bar=bar), Recipe(steps=steps, spacing=spacing)).tolist()
    betas = 1 - bar / np.append(1.0, bar[:-1])
    stock = DDPMScheduler(
        trained_betas=betas.tolist(),
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing=spacing,
    )
    stock.set_timesteps(steps)
    assert stock.timesteps.tolist() == kept[::-1]
    exact = DDPMScheduler(**dict(stock.config))
    exact.set_timesteps(steps)
    exact.alphas_cumprod = torch.from_numpy(bar)
    torch.manual_seed(0)
    x, eps = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)
    v = torch.rand(4, 2, 3, 3, dtype=torch.float64) * 2 - 1
    places = sorted({0, 1, 2, 5, steps // 2, steps - 1})
    for place in places:
        generator = torch.Generator().manual_seed(place)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        ours = learned_step(x, eps, v, noise, kept, place, bar)
        other = improved_diffusion_step(x, eps, v, noise, kept, place, bar)
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)
        if place == 0 and kept[0] > 0:
            continue  # diffusers adds noise to the last step here, see the next test
        for scheduler, tolerance in ((exact, 1e-12), (stock, 3e-3)):
            generator = torch.Generator().manual_seed(place)
            out = torch.cat([eps, v], dim=1)
            theirs = scheduler.step(out, kept[place], x, generator=generator)[0]
            scale = max(1.0, ours.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def test_why_the_last_step_is_not_diffusers() -> None:
    """A chain that ends at t > 0 must not end with noise; DDPMScheduler's does."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    stock = DDPMScheduler(
        beta_schedule="linear", variance_type="learned_range", timestep_spacing="trailing"
    )
    stock.set_timesteps(50)
    last = int(stock.timesteps[-1])
    out = torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)], dim=1)
    ends = [
        stock.step(out, last, torch.zeros(1, 1, 8, 8), torch.Generator().manual_seed(s))[0]
        for s in (0, 1)
    ]
    assert (ends[0] - ends[1]).abs().max() > 0.01


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_samples_do_not_depend_on_batch_order_or_company(sampler: str) -> None:
    facts, recipe, model = process(), Recipe(sampler=sampler, steps=8, seed=5), GaussianDenoiser()
    whole = sample(model, facts, recipe, numbers=range(7), batch_size=7, dtype=torch.float64)
    pieces = sample(model, facts, recipe, numbers=range(7), batch_size=3, dtype=torch.float64)
    alone = sample(model, facts, recipe, numbers=[5, 2], batch_size=1, dtype=torch.float64)
    torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-12)
    torch.testing.assert_close(alone, whole[[5, 2]], rtol=0, atol=1e-12)
    again = sample(model, facts, recipe, numbers=range(7), batch_size=7, dtype=torch.float64)
    assert torch.equal(whole, again)
    other = Recipe(sampler=sampler, steps=8, seed=6)
    assert not torch.allclose(whole, sample(model, facts, other, numbers=range(7)).double())
    assert len(torch.unique(whole[:, 0, 0, 0])) == 7  # no two samples share their noise


def test_guidance_formula_and_quirk() -> None:
    torch.manual_seed(0)
    c, n = torch.randn(2, 5, 8, 3, 3)
    full = guided(c, n, 1.5, 4)
    torch.testing.assert_close(full[:, :4], n[:, :4] + 1.5 * (c[:, :4] - n[:, :4]))
    assert torch.equal(full[:, 4:], c[:, 4:])  # the variance is never guided
    three = guided(c, n, 1.5, 3)
    assert torch.equal(three[:, :3], full[:, :3]) and torch.equal(three[:, 3:], c[:, 3:])
    torch.testing.assert_close(guided(c, n, 1.0, 4), c)


def test_guidance_doubles_the_batch_once_and_moves_the_mean() -> None:
    """Classes at +-0.4, null in the middle: guidance 2 shifts a Gaussian's mean to +-0.8."""
    shifts = torch.tensor([0.4, -0.4, 0.0], dtype=torch.float64)
    facts = process(conditions=labelled(2))
    labels = torch.zeros(4000, dtype=torch.int64)
    model = GaussianDenoiser(shifts=shifts)
    recipe = Recipe(sampler="dpm++", steps=25, guidance=2.0)
    x = sample(model, facts, recipe, conditions_N={"label": labels}, batch_size=4000)
    assert model.calls == [8000] * 25
    check_moments(x, MEAN + 0.8, 0.045)
    model.calls.clear()
    plain = Recipe(sampler="dpm++", steps=25)
    x = sample(model, facts, plain, conditions_N={"label": labels}, batch_size=4000)
    assert model.calls == [4000] * 25  # nothing is computed and thrown away
    check_moments(x, MEAN + 0.4, 0.045)
    x = sample(model, facts, plain, numbers=range(4000), batch_size=4000)
    assert model.calls == [4000] * 50
    check_moments(x, MEAN, 0.045)  # no labels: the null label


def test_model_is_told_tau_and_gets_its_dtype() -> None:
    seen: list[float] = []

    def model(x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
        assert x.dtype == torch.bfloat16 and tau.dtype == torch.float32 and label is None
        seen.append(tau[0].item())
        return torch.zeros_like(x)

    facts = process()
    facts = replace(facts, schedule=replace(facts.schedule, time=10 * facts.schedule.time))
    x = sample(model, facts, Recipe(steps=3), numbers=range(2), dtype=torch.bfloat16)
    assert seen == [9990.0, 5000.0, 0.0] and x.dtype == torch.float32


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_clipping_keeps_pixels_in_range(sampler: str) -> None:
    def wild(x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
        return 5 * torch.ones_like(x)

    facts = process("x0")
    clipped = Recipe(sampler=sampler, steps=10, clip_x0=True)
    x = sample(wild, facts, clipped, numbers=range(3))
    torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=0.02)
    assert sample(wild, facts, Recipe(sampler=sampler, steps=10), numbers=range(3)).mean() > 4


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_few_steps(sampler: str, steps: int) -> None:
    x = sample(
        GaussianDenoiser(), process(), Recipe(sampler=sampler, steps=steps), numbers=range(50)
    )
    assert torch.isfinite(x).all() and x.abs().max() < 10
