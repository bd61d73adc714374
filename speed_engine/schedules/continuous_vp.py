"""The variance-preserving SDE in continuous time (Song et al. 2021; row VP of the SpeeD paper's
table 1).

B_t = beta_min t + (beta_max - beta_min) t^2 / 2, alpha = exp(-B/2), sigma^2 = 1 - exp(-B), t
uniform in [t_min, 1]. With u = 1 - alpha^2: du/dt = beta_t exp(-B_t), largest at (sqrt(D) -
beta_min) / D = 0.2191 where D is beta_max - beta_min; 1/alpha_bar reaches r at (-beta_min +
sqrt(beta_min^2 + 2 D ln r)) / D.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.kinds import Section
from speed_engine.schedules import NUM_CELLS, Schedule, cells, on_curve


class Config(Section):
    """`schedule.kind: continuous_vp`."""

    kind: Literal["continuous_vp"] = "continuous_vp"
    beta_min: float = Field(0.1, gt=0, description="beta at t = 0")
    beta_max: float = Field(20.0, gt=0, description="beta at t = 1")
    t_min: float = Field(1e-5, ge=0, lt=1, description="times below are not trained")
    time_scale: float = Field(1000.0, gt=0, description="the network is told time_scale * t")
    num_cells: int = Field(NUM_CELLS, ge=16, le=2**20, description="rows of the table")


def build(config: Config) -> Schedule:
    """Rows at the middles of equal cells of t."""
    curve = functools.partial(_curve, config)
    return on_curve("continuous_vp", curve, *cells(config.t_min, 1.0, config.num_cells))


def _curve(config: Config, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = config.beta_min * t + (config.beta_max - config.beta_min) * t.square() / 2
    return torch.exp(-b / 2), (-torch.expm1(-b)).sqrt(), config.time_scale * t
