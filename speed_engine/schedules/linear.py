"""The linear schedule of DDPM (Ho et al. 2020): betas from 1e-4 to 0.02 in equal steps."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import DiscreteConfig, Schedule, from_betas, scaled_beta


class Config(DiscreteConfig):
    """`schedule.kind: linear`."""

    kind: Literal["linear"] = "linear"
    beta_start: float | None = Field(
        None, gt=0, lt=1, description="first beta; default 1e-4 * 1000 / num_steps"
    )
    beta_end: float | None = Field(
        None, gt=0, lt=1, description="last beta; default 0.02 * 1000 / num_steps"
    )


def build(config: Config) -> Schedule:
    """beta_t = beta_1 + (t - 1) / (T - 1) * (beta_T - beta_1)."""
    start = config.beta_start or scaled_beta(1e-4, config.num_steps)
    end = config.beta_end or scaled_beta(0.02, config.num_steps)
    betas = torch.linspace(start, end, config.num_steps, dtype=torch.float64)
    return from_betas("linear", betas, config.zero_terminal_snr)
