"""From a trained network to samples. One file a sampler: its name is the word behind `sample --sampler`.

    Config                          with `kind: Literal["<the file's name>"]`
    SPACING                         which of the steps it likes: linspace or trailing (see `grid`)
    LARGEST_MAGNIFICATION           steps at which x0 = a out + b x has a larger |a| are left out
    EVALUATIONS                     network evaluations a step, the last one apart
    build(alpha_bar, clip_x0) -> Sampler

A sampler is one update from a noise level to the one below it, on the variance-preserving process x / sqrt(alpha^2 +
sigma^2) that every schedule follows. It knows neither network nor schedule nor guidance. The levels are the business of
`grid`: they come from the schedule, never from the density that training drew from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

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
