"""Sampler `heun`: the second-order ODE sampler of EDM (arXiv 2206.00364, algorithm 1); 18 steps are 35 evaluations.

In s = sigma / alpha the ODE is dx/ds = (x - D(x, s)) / s, D the prediction of x0. An Euler step from s to s', then the
mean of the slopes at both ends; the last step, to 0, is Euler's. Written out, with D' at the Euler step's end:

    x' = s'/s x + (1 - s'/s) (D + c (D' - D))            c = s / (2 s')

From pure noise (zero SNR; t = 1 of rectified flow) s is in the thousands and s' is not: c, which multiplies what the
network does not know there, would be in the hundreds. While noise dominates, s > 1, it is held at 1, where a solver
that takes D for linear in log-SNR has it on an endless step. EDM's own levels, 18 or more, never come that far.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from torch import Tensor

from speed_engine.kinds import Section
from speed_engine.sampling import Noise, Predict
from speed_engine.sampling.grid import strictly_falling

SPACING = "trailing"
LARGEST_MAGNIFICATION = math.exp(5.1)  # as ddim's


class Config(Section):
    """`--sampler heun`."""

    kind: Literal["heun"] = "heun"


def build(alpha_bar: np.ndarray, clip_x0: bool) -> Heun:
    """alpha_bar: float64 [S], of the levels."""
    bar = strictly_falling(alpha_bar)
    return Heun(np.sqrt((1 - bar) / bar), clip_x0)


class Heun:
    """See `speed_engine.sampling.Sampler`. s_S: sigma / alpha of the levels, ascending."""

    def __init__(self, s_S: np.ndarray, clip_x0: bool) -> None:
        self.s_S, self.clip_x0 = s_S, clip_x0

    def step(self, level: int, x: Tensor, predict: Predict, noise: Noise) -> Tensor:
        here = float(self.s_S[level])
        x0 = self._x0(level, x, predict)
        if level == 0:
            return x0
        below = float(self.s_S[level - 1])
        ratio, down = below / here, 1 / math.hypot(1, below)
        kept = (
            ratio * math.hypot(1, here) * down * x
        )  # x itself is on the variance-preserving process
        euler = kept + (1 - ratio) * down * x0
        correction = 1 / (2 * ratio)
        if here > 1:
            correction = min(correction, 1.0)
        second = self._x0(level - 1, euler, predict)
        return kept + (1 - ratio) * down * (x0 + correction * (second - x0))

    def _x0(self, level: int, x: Tensor, predict: Predict) -> Tensor:
        x0, _ = predict(level, x)
        return x0.clamp(-1, 1) if self.clip_x0 else x0
