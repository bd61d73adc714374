"""Stable Diffusion's schedule (Rombach et al. 2022): the quadratic rule from 0.00085 to 0.012.

It ends early: 1/alpha_bar reaches only 214.6, so a convergence area of magnitude r = 1000 does not
exist on it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import DiscreteConfig, Schedule, from_betas, scaled_beta


class Config(DiscreteConfig):
    """`schedule.kind: scaled_linear`."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    beta_start: float | None = Field(
        None, gt=0, lt=1, description="first beta; default 0.00085 * 1000 / num_steps"
    )
    beta_end: float | None = Field(
        None, gt=0, lt=1, description="last beta; default 0.012 * 1000 / num_steps"
    )


def build(config: Config) -> Schedule:
    """sqrt(beta_t) in equal steps, as latent diffusion's `linear` (diffusers: `scaled_linear`)."""
    start = config.beta_start or scaled_beta(0.00085, config.num_steps)
    end = config.beta_end or scaled_beta(0.012, config.num_steps)
    betas = torch.linspace(start**0.5, end**0.5, config.num_steps, dtype=torch.float64).square()
    return from_betas("scaled_linear", betas, config.zero_terminal_snr)
