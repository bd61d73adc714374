"""Sampler `dpmpp`, also written dpm++: DPM-Solver++(2M) (arXiv 2211.01095); diffusers' on the respaced process."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from speed_engine.kinds import Section
from speed_engine.sampling import Noise, Predict
from speed_engine.sampling.ddim import respaced
from speed_engine.sampling.grid import strictly_falling

SPACING = "trailing"
LARGEST_MAGNIFICATION = math.exp(5.1)  # as ddim's


class Config(Section):
    """`--sampler dpmpp`."""

    kind: Literal["dpmpp"] = "dpmpp"


def build(alpha_bar: np.ndarray, clip_x0: bool) -> DpmSolver:
    """alpha_bar: float64 [S], of the levels."""
    return DpmSolver(strictly_falling(alpha_bar), clip_x0)


class DpmSolver:
    """See `speed_engine.sampling.Sampler`."""

    def __init__(self, alpha_bar: np.ndarray, clip_x0: bool) -> None:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        self.scheduler: Any = DPMSolverMultistepScheduler(
            **respaced(alpha_bar),
            solver_order=2,
            thresholding=clip_x0,  # with an upper end of 1 it is plain clipping to [-1, 1]
            sample_max_value=1.0,
            timestep_spacing="trailing",
        )
        # The scheduler's own is in float32, from the betas; ours is exact.
        self.scheduler.alphas_cumprod = torch.from_numpy(alpha_bar)
        self.scheduler.set_timesteps(len(alpha_bar))

    def step(self, level: int, x: Tensor, predict: Predict, noise: Noise) -> Tensor:
        x0, _ = predict(level, x)
        return self.scheduler.step(x0, level, x).prev_sample
