"""Sampler `ddpm`: the ancestral chain, with a learned variance where the network has one."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from speed_engine.kinds import Section
from speed_engine.sampling import Noise, Predict

SPACING = "linspace"  # as in ADM and DiT: holds the first and the last step
LARGEST_MAGNIFICATION = float(np.finfo(np.float64).max)  # only where x0 cannot be told at all


class Config(Section):
    """`--sampler ddpm`."""

    kind: Literal["ddpm"] = "ddpm"


def build(alpha_bar: np.ndarray, clip_x0: bool) -> Ddpm:
    """alpha_bar: float64 [S], of the levels."""
    return Ddpm(alpha_bar, clip_x0)


class Ddpm:
    """See `speed_engine.sampling.Sampler`."""

    def __init__(self, alpha_bar: np.ndarray, clip_x0: bool) -> None:
        self.alpha_bar, self.clip_x0 = alpha_bar, clip_x0

    def step(self, level: int, x: Tensor, predict: Predict, noise: Noise) -> Tensor:
        x0, fraction = predict(level, x)
        x0 = x0.clamp(-1, 1) if self.clip_x0 else x0
        previous = float(self.alpha_bar[level - 1]) if level else 1.0
        fresh = noise() if level else None
        return ancestral_step(x, x0, fraction, fresh, float(self.alpha_bar[level]), previous)


def ancestral_step(
    x: Tensor,
    x0: Tensor,
    fraction: Tensor | None,
    noise: Tensor | None,
    alpha_bar: float,
    alpha_bar_previous: float,
) -> Tensor:
    """One step x_t -> x_{t-1} of the learned-variance sampler.

    Mean: arXiv 2006.11239, eq. 7; log variance: arXiv 2102.09672, eq. 15.
    fraction: (v + 1) / 2, the network's place between the posterior variance (0) and beta (1), in
    log; None takes the posterior variance. noise: None on the last step (alpha_bar_previous = 1),
    which adds none.

    Why not DDPMScheduler.step: it draws its noise from a stream, which ties a sample to its batch;
    it keeps its table in float32, where 1 - alpha_bar_t / alpha_bar_{t-1} is off by up to 4e-4 at
    the small t; and it decides by "t > 0" whether to add noise, so a respaced chain that does not
    end at t = 0 ends with noise. Apart from that the two agree to 1e-12, which a test checks.
    """
    beta = 1 - alpha_bar / alpha_bar_previous
    to_x0 = math.sqrt(alpha_bar_previous) * beta / (1 - alpha_bar)
    to_x = math.sqrt(1 - beta) * (1 - alpha_bar_previous) / (1 - alpha_bar)
    mean = to_x0 * x0 + to_x * x
    if noise is None:
        return mean
    log_max = math.log(beta)
    log_min = math.log(beta * (1 - alpha_bar_previous) / (1 - alpha_bar))
    if fraction is None:
        return mean + math.exp(0.5 * log_min) * noise
    return mean + torch.exp(0.5 * (fraction * log_max + (1 - fraction) * log_min)) * noise
