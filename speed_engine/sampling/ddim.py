"""Sampler `ddim`: deterministic, first order (arXiv 2010.02502); diffusers' scheduler on the respaced process.

It is Euler's method in sigma / alpha, for which there is no file of its own therefore.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from speed_engine.kinds import Section
from speed_engine.sampling import Noise, Predict

SPACING = "trailing"  # starts at pure noise (arXiv 2305.08891, table 2)
# Where alpha is nearly 0 an epsilon model's error is magnified by sigma / alpha in x0 (20,000 times
# at the end of the cosine schedule). An ODE solver must not start there; DPM-Solver's own cure is
# to start at ln(alpha / sigma) = -5.1, which is this magnification.
LARGEST_MAGNIFICATION = math.exp(5.1)


class Config(Section):
    """`--sampler ddim`."""

    kind: Literal["ddim"] = "ddim"


def build(alpha_bar: np.ndarray, clip_x0: bool) -> Ddim:
    """alpha_bar: float64 [S], of the levels."""
    return Ddim(alpha_bar, clip_x0)


def respaced(alpha_bar: np.ndarray) -> dict[str, Any]:
    """What diffusers' schedulers are told of a chain of its own, whose steps are S-1 ... 0."""
    betas = 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return {
        "num_train_timesteps": len(alpha_bar),
        "trained_betas": betas.tolist(),
        "prediction_type": "sample",
    }


class Ddim:
    """See `speed_engine.sampling.Sampler`."""

    def __init__(self, alpha_bar: np.ndarray, clip_x0: bool) -> None:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        self.clip_x0 = clip_x0
        self.scheduler: Any = DDIMScheduler(
            **respaced(alpha_bar), clip_sample=clip_x0, timestep_spacing="leading"
        )
        # The scheduler's own is in float32, from the betas; ours is exact (see `ancestral_step`).
        self.scheduler.alphas_cumprod = torch.from_numpy(alpha_bar)
        self.scheduler.set_timesteps(len(alpha_bar))

    def step(self, level: int, x: Tensor, predict: Predict, noise: Noise) -> Tensor:
        x0, _ = predict(level, x)
        # As in ADM, epsilon is derived again from a clipped x0.
        clipped = {"use_clipped_model_output": self.clip_x0}
        return self.scheduler.step(x0, level, x, **clipped).prev_sample
