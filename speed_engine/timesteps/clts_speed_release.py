"""The "CLTS" baseline of the SpeeD release: its Gaussian is a spike at step 300, so it is uniform
for nearly all of the run.

The code computes exp(-(t - 300)^2 / 2 * T^2) where / (2 * T^2) was meant, with the prefactor 1 / (T
sqrt(2 pi)): one step of height 4e-4 against a uniform density of 1e-3. Mixed by a = step / 50000 it
stays within 0.4 % (total variation) of uniform for 90 % of the run and ends as that single step;
beyond 50000 steps the released code fails. The method itself is `clts`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, require_discrete
from speed_engine.timesteps.online.mixture import Mixture


class Config(MethodConfig):
    """`timesteps.kind: clts_speed_release`."""

    kind: Literal["clts_speed_release"] = "clts_speed_release"
    mu: int = Field(300, ge=0, description="the step of the spike")
    total_steps: int = Field(
        50_000, ge=1, description="training steps until the density has arrived"
    )
    every: int = Field(100, ge=1, description="training steps between two updates of the table")


def build(config: Config, schedule: Schedule) -> Method:
    """Raises ValueError on continuous schedules and for a spike outside the schedule."""
    require_discrete(config.kind, schedule)
    size = schedule.num_rows
    if config.mu >= size:
        raise ValueError(f"timesteps.mu={config.mu} is not one of the schedule's {size} steps")
    step = torch.arange(size, dtype=torch.float64)
    spike = torch.exp(-((step - config.mu) ** 2) / 2 * size**2) / (size * math.sqrt(2 * math.pi))
    return Method(
        schedule.uniform,
        torch.ones_like(spike),
        online=Mixture(spike, config.total_steps, config.every),
    )
