"""The quadratic schedule: square roots of the betas in equal steps, with DDPM's ends (1e-4 and
0.02).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import DiscreteConfig, Schedule, from_betas, scaled_beta


class Config(DiscreteConfig):
    """`schedule.kind: quadratic`."""

    kind: Literal["quadratic"] = "quadratic"
    beta_start: float | None = Field(
        None, gt=0, lt=1, description="first beta; default 1e-4 * 1000 / num_steps"
    )
    beta_end: float | None = Field(
        None, gt=0, lt=1, description="last beta; default 0.02 * 1000 / num_steps"
    )


def build(config: Config) -> Schedule:
    """sqrt(beta_t) = sqrt(beta_1) + (t - 1) / (T - 1) * (sqrt(beta_T) - sqrt(beta_1))."""
    start = config.beta_start or scaled_beta(1e-4, config.num_steps)
    end = config.beta_end or scaled_beta(0.02, config.num_steps)
    betas = torch.linspace(start**0.5, end**0.5, config.num_steps, dtype=torch.float64).square()
    return from_betas("quadratic", betas, config.zero_terminal_snr)
