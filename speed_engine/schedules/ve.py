"""The variance-exploding process x = x0 + sigma eps, ln sigma uniform (Song et al. 2021; row VE of
SpeeD's table 1).

Taken literally the SpeeD paper finds no areas here (with sigma^2 = t the increments' variance grows
at a constant rate); the noise fraction u = sigma^2 / (sigma^2 + sigma_data^2) has a peak and a
plateau on every schedule. The network is told ln(sigma) / 4.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.kinds import Section
from speed_engine.schedules import NUM_CELLS, Schedule, cells, on_curve


class Config(Section):
    """`schedule.kind: ve`."""

    kind: Literal["ve"] = "ve"
    sigma_min: float = Field(0.02, gt=0, description="smallest noise level")
    sigma_max: float = Field(100.0, gt=0, description="largest noise level")
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of x0, for SNR")
    num_cells: int = Field(NUM_CELLS, ge=16, le=2**20, description="rows of the table")


def build(config: Config) -> Schedule:
    """Rows at the middles of equal cells of ln sigma. Raises ValueError for an empty range."""
    return sigma_schedule(
        "ve", config.sigma_min, config.sigma_max, config.sigma_data, config.num_cells
    )


def sigma_schedule(
    kind: str, sigma_min: float, sigma_max: float, sigma_data: float, num_cells: int
) -> Schedule:
    """x0 + sigma eps on [sigma_min, sigma_max] with coordinate ln sigma and time = ln(sigma) / 4."""
    if not sigma_min < sigma_max:
        raise ValueError(
            f"schedule.sigma_min={sigma_min:g} must be below schedule.sigma_max={sigma_max:g}"
        )
    middles, widths = cells(math.log(sigma_min), math.log(sigma_max), num_cells)
    return on_curve(kind, _curve, middles, widths, sigma_data)


def _curve(log_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(log_sigma), log_sigma.exp(), log_sigma / 4
