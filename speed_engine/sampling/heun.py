"""Sampler `heun`: the second-order ODE sampler of EDM (arXiv 2206.00364, algorithm 1); 18 steps are 35 evaluations.

In s = sigma / alpha the ODE is dx/ds = (x - x0(x, s)) / s with x = x_vp sqrt(1 + s^2). An Euler step to the level
below, then the mean of the slopes at both ends; the last step, to s = 0, is Euler's.
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
EVALUATIONS = 2


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
        wide, down = x * math.hypot(1, here), 1 / math.hypot(1, below)
        slope = (wide - x0) / here
        euler = wide + (below - here) * slope
        second = (euler - self._x0(level - 1, euler * down, predict)) / below
        return (wide + (below - here) * 0.5 * (slope + second)) * down

    def _x0(self, level: int, x: Tensor, predict: Predict) -> Tensor:
        x0, _ = predict(level, x)
        return x0.clamp(-1, 1) if self.clip_x0 else x0
