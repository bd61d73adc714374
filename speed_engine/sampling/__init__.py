"""From a trained network to samples. One file a sampler: its name is the word behind `sample --sampler`.

A sampler is one update from a noise level to the one below it, on the variance-preserving process x / sqrt(alpha^2 +
sigma^2) that every schedule follows. It knows neither network nor schedule nor guidance. The levels are the business of
`grid`: they come from the schedule, never from the density that training drew from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel
from torch import Tensor

# (level, x) -> (x0, what the network says of the variance in [0, 1], or None). Levels count from 0, the cleanest.
Predict = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
# Fresh normals of x's shape for this step of the chain; the same numbers at each call.
Noise = Callable[[], Tensor]


class Sampler(Protocol):
    """One chain for one batch; `step` is called with level = S - 1, ..., 0."""

    def step(self, level: int, x: Tensor, predict: Predict, noise: Noise) -> Tensor:
        """x at the level below; at level 0 the sample. Noise is drawn only where the sampler adds some."""
        ...


class SamplerFile(Protocol):
    """What a file of this folder, or a module from outside, offers.

    Config: with `kind: Literal["<the file's name>"]`. SPACING: how it likes its levels (see `grid`): trailing for a
    solver of the ODE, linspace for a chain that adds noise. LARGEST_MAGNIFICATION: levels at which x0 = a output + b x
    has a larger |a| are left out. build: alpha_bar, float64 [S], ascending in noise, of which only the last can be 0;
    clip_x0: clamp each prediction of x0 to [-1, 1].
    """

    Config: type[BaseModel]
    SPACING: Literal["linspace", "leading", "trailing"]
    LARGEST_MAGNIFICATION: float

    def build(self, alpha_bar: np.ndarray, clip_x0: bool) -> Sampler: ...
