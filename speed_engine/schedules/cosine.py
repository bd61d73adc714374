"""The cosine schedule of improved DDPM (Nichol and Dhariwal 2021, eq. 17), betas capped at 0.999."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import DiscreteConfig, Schedule, from_betas


class Config(DiscreteConfig):
    """`schedule.kind: cosine`."""

    kind: Literal["cosine"] = "cosine"
    offset: float = Field(0.008, ge=0, description="s, keeps beta_1 away from zero")
    max_beta: float = Field(0.999, gt=0, lt=1, description="cap of the last betas")


def build(config: Config) -> Schedule:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) * pi / 2), rebuilt from the
    capped betas.
    """
    time = torch.arange(config.num_steps + 1, dtype=torch.float64) / config.num_steps
    f = ((time + config.offset) / (1 + config.offset) * math.pi / 2).cos().square()
    betas = (1 - f[1:] / f[:-1]).clamp(max=config.max_beta)
    return from_betas("cosine", betas, config.zero_terminal_snr)
