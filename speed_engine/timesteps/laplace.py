"""Laplace-distributed log-SNR (Hang et al. 2025, ICCV): L ~ Laplace(mean, b), centred where signal
and noise balance.

Defaults mean = 0 and b = 0.5 (b as quoted by third parties). Narrow: 2.4e-5 of the mass is on the
last 300 of linear DDPM's steps. Mass outside the schedule is not drawn. Weight one.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, cell_mass


class Config(MethodConfig):
    """`timesteps.kind: laplace`."""

    kind: Literal["laplace"] = "laplace"
    mean: float = Field(0.0, description="centre in log-SNR")
    b: float = Field(0.5, gt=0, description="scale in log-SNR")


def build(config: Config, schedule: Schedule) -> Method:
    """Mass of the law in the cells of log-SNR."""

    def cdf(level: Tensor) -> Tensor:  # level = -log-SNR, which rises with the rows
        x = (level + config.mean) / config.b
        return torch.where(x < 0, x.clamp(max=0).exp() / 2, 1 - (-x.clamp(min=0)).exp() / 2)

    density = cell_mass(-schedule.log_snr, cdf, config.kind)
    return Method(density, torch.ones_like(density))
