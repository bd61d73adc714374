"""Mode sampling with heavy tails (Esser et al. 2024, SD3, eq. 20): t = 1 - u - a (cos^2(pi u / 2) -
1 + u), u uniform.

Default a = 1.29, weight one. t is the training coordinate as a share of its range (the index, or
flow's t).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import Schedule, interpolate
from speed_engine.timesteps import Method, MethodConfig, normalised


class Config(MethodConfig):
    """`timesteps.kind: mode`."""

    kind: Literal["mode"] = "mode"
    scale: float = Field(
        1.29,
        ge=-1,
        lt=1.75,
        description="a; positive favours the middle. From 2/(pi-2) on t(u) folds",
    )


def build(config: Config, schedule: Schedule) -> Method:
    """P(T <= t) = 1 - u(t), the inverse by interpolation on 2^17 points."""
    u = torch.linspace(1, 0, 2**17 + 1, dtype=torch.float64)
    t = 1 - u - config.scale * ((math.pi * u / 2).cos().square() - 1 + u)
    cdf = interpolate(schedule.share_edges, t, 1 - u)
    density = normalised(cdf.diff(), config.kind)
    return Method(density, torch.ones_like(density))
