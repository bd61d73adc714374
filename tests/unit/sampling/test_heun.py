"""Heun's method: EDM's algorithm on EDM's levels, and its order from pure noise on any others."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_engine.sampling import ddim, heun

MEAN, VARIANCE = 0.5, 0.3


def denoise(x: Tensor, s: float) -> Tensor:
    """The ideal D of N(MEAN, VARIANCE) at x0 + s eps, bent a little so that it is not linear in x."""
    linear = MEAN + VARIANCE / (VARIANCE + s**2) * (x - MEAN)
    return linear + 0.1 * torch.sin(linear)


def chain(module, s_S: np.ndarray, noise: Tensor, network=denoise) -> Tensor:
    """The samples of a file's sampler on levels sigma / alpha, ascending."""
    sampler = module.build(1 / (1 + s_S**2), False)

    def predict(level: int, x: Tensor) -> tuple[Tensor, None]:
        s = float(s_S[level])
        return network(x * math.hypot(1, s), s), None

    x = noise
    for level in reversed(range(len(s_S))):
        x = sampler.step(level, x, predict, lambda: noise)
    return x


def karras(steps: int) -> np.ndarray:
    root = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), steps)
    return root**7


@pytest.mark.parametrize("steps", [18, 40, 100])
def test_edms_algorithm_on_edms_levels(steps: int) -> None:
    """Karras et al., algorithm 1, in its own words: d_i, x_{i+1}, d_i'."""
    t = [*karras(steps)[::-1].tolist(), 0.0]
    noise = torch.linspace(-3, 3, 31, dtype=torch.float64)
    x = noise * math.hypot(1, t[0])  # a sample's noise has unit variance at every start
    for here, below in itertools.pairwise(t):
        slope = (x - denoise(x, here)) / here
        after = x + (below - here) * slope
        if below != 0:
            second = (after - denoise(after, below)) / below
            after = x + (below - here) * (slope / 2 + second / 2)
        x = after
    torch.testing.assert_close(chain(heun, karras(steps), noise), x, rtol=1e-10, atol=1e-10)


def flow_levels(steps: int) -> np.ndarray:
    t = np.arange(1, steps + 1) / steps
    return np.append(t[:-1] / (1 - t[:-1]), 4096.0)


def linear_levels(steps: int) -> np.ndarray:
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    s = np.sqrt((1 - bar) / bar)
    return s[np.round(np.arange(1, steps + 1) * 1000 / steps).astype(int) - 1]


@pytest.mark.parametrize("levels", [karras, flow_levels, linear_levels])
@pytest.mark.parametrize("steps", [3, 6, 12, 25])
def test_it_is_nearer_than_euler_at_any_number_of_steps(levels, steps: int) -> None:
    """Of Gaussian data the whole chain is known: (noise + what the mean is of it) times the deviation."""

    def gaussian(x: Tensor, s: float) -> Tensor:
        return MEAN + VARIANCE / (VARIANCE + s**2) * (x - MEAN)

    noise = torch.linspace(-2, 2, 41, dtype=torch.float64)
    s = levels(steps)
    top, end = float(s[-1]), float(s[0])
    x = noise * math.hypot(1, top)
    at_end = MEAN + (x - MEAN) * math.sqrt((VARIANCE + end**2) / (VARIANCE + top**2))
    exact = gaussian(at_end, end)
    error, eulers = (
        float((chain(module, s, noise, gaussian) - exact).abs().max()) for module in (heun, ddim)
    )
    assert error < eulers, (error, eulers)
    if steps >= 12:
        assert error < (0.25 if steps == 25 else 0.5) * eulers
