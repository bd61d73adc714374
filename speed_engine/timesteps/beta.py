"""Beta-distributed times (B-TTDM): t / T ~ Beta(a, b), defaults a = 0.8 and b = 1 (less than
uniform mass at the noisy end).

Defaults as third-party trainers quote the paper. t / T is the training coordinate as a share of its
range. Weight one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, normalised


class Config(MethodConfig):
    """`timesteps.kind: beta`."""

    kind: Literal["beta"] = "beta"
    a: float = Field(0.8, gt=0, description="shape at the clean end; below 1 the density diverges")
    b: float = Field(1.0, gt=0, description="shape at the noisy end")


def build(config: Config, schedule: Schedule) -> Method:
    """Mass of Beta(a, b) in every cell of the coordinate."""
    density = normalised(beta_mass(schedule.share_edges, config.a, config.b), config.kind)
    return Method(density, torch.ones_like(density))


def beta_mass(edges: Tensor, a: float, b: float) -> Tensor:
    """Integrals of x^(a-1) (1-x)^(b-1) between rising `edges` in [0, 1]; float64.

    The substitution y = x^a below 1/2, y = (1-x)^b above, takes the divergence at either end away;
    Gauss-Legendre with 16 points does the rest.
    """
    low, high = edges[:-1], edges[1:]
    left = _power_integral(low.clamp(max=0.5), high.clamp(max=0.5), a, b)
    right = _power_integral(1 - high.clamp(min=0.5), 1 - low.clamp(min=0.5), b, a)
    return left + right


def _power_integral(low: Tensor, high: Tensor, a: float, b: float) -> Tensor:
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(16))
    start, end = low**a, high**a
    y = (start + end)[:, None] / 2 + (end - start)[:, None] / 2 * nodes
    return (end - start) / 2 * ((1 - y ** (1 / a)) ** (b - 1) * weights).sum(1) / a
