"""EDM and FDM on data whose exact denoiser is known: a mixture of Gaussians, sampled by Heun's method."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from speed_engine import kinds
from speed_engine.sampling.process import Process, Recipe, sample
from speed_engine.step_table import StepTable, build_step_table

NUM = 1500
SHARE = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-0.6, 0.2], [0.3, -0.1]], dtype=torch.float64)
FACTORS = torch.tensor([[[0.3, 0.0], [0.1, 0.2]], [[0.25, 0.0], [-0.2, 0.3]]], dtype=torch.float64)
COVARIANCES = FACTORS @ FACTORS.mT
MEAN = SHARE @ MEANS
COVARIANCE = torch.einsum(
    "k,kij->ij", SHARE, COVARIANCES + MEANS[:, :, None] * MEANS[:, None]
) - torch.outer(MEAN, MEAN)


def denoised(x_B2: Tensor, sigma: float) -> Tensor:
    """E[x0 | x0 + sigma eps = x] of the mixture."""
    noisy = COVARIANCES + sigma**2 * torch.eye(2, dtype=torch.float64)
    off_BK2 = x_B2[:, None] - MEANS
    solved_BK2 = torch.linalg.solve(noisy, off_BK2[..., None])[..., 0]
    log_BK = SHARE.log() - 0.5 * ((off_BK2 * solved_BK2).sum(2) + torch.logdet(noisy))
    x0_BK2 = MEANS + (COVARIANCES @ solved_BK2[..., None])[..., 0]
    return (log_BK.softmax(1)[..., None] * x0_BK2).sum(1)


def table(objective: str, timesteps: object) -> StepTable:
    return build_step_table(
        kinds.config_of("schedule", "edm"),
        kinds.config_of("objective", objective),
        kinds.config_of("timesteps", timesteps),
        False,
    )


@pytest.mark.parametrize(
    ("objective", "timesteps", "steps"),
    [("edm", "edm", 60), ("fdm", "speed_u", 60), ("edm", "speed", 18), ("fdm", "edm", 18)],
)
def test_sampled_moments_are_the_datas(objective: str, timesteps: str, steps: int) -> None:
    """A network whose output is exactly the preconditioned target, whatever density training moved the rows by."""
    config = kinds.config_of("objective", objective)
    schedule = table(objective, timesteps).schedule
    process = Process.of(schedule, config, False, (2, 1, 1), {})
    calls: list[float] = []

    def network(inputs: Tensor, time_B: Tensor) -> Tensor:
        sigma = math.exp(4 * float(time_B[0]))
        calls.append(sigma)
        scale = 1 / math.hypot(sigma, 0.5)
        if objective == "fdm":
            b = (sigma - 0.002) / (80 - 0.002)
            b = 2 * (0.1 * b + 19.9 * b * b / 2)
            scale = (1 + b) * math.exp(-b)
        x = inputs.double().flatten(1) / scale
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.hypot(sigma, 0.5)
        return ((denoised(x, sigma) - c_skip * x) / c_out).reshape(inputs.shape)

    recipe = Recipe(sampler="heun", steps=steps)
    many = {"numbers": range(NUM), "batch_size": NUM, "dtype": torch.float64}
    x = sample(network, process, recipe, **many).flatten(1)
    assert len(calls) == 2 * steps - 1
    visited = sorted(set(calls))  # the Karras grid, from 0.002 to 80
    root = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), steps, dtype=torch.float64)
    assert len(visited) == steps
    torch.testing.assert_close(
        torch.tensor(visited, dtype=torch.float64), root**7, rtol=2e-6, atol=0
    )
    off = x - MEAN
    error = (x.std(0) / NUM**0.5).double()
    assert (off.mean(0).abs() < 4 * error).all(), off.mean(0) / error
    products = off[:, :, None] * off[:, None]
    error = products.std(0) / NUM**0.5
    # Of this mixture the method's own error is a tenth of the variance at 18 steps, and hundredths at 60.
    own = 0.13 * torch.diag(COVARIANCE).max() if steps == 18 else 0.0
    assert ((products.mean(0) - COVARIANCE).abs() < 4 * error + own).all()
    first = (x - MEANS[0]).norm(dim=1) < (x - MEANS[1]).norm(dim=1)
    assert 0.2 < first.double().mean() < 0.4  # both parts are there
