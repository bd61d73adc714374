"""Cauchy-distributed log-SNR (Hang et al. 2025, ICCV): L ~ Cauchy(mean, gamma), `laplace` with
heavy tails.

Defaults mean = 0, gamma = 0.5 (the authors' scale of the Laplace law; theirs for Cauchy could not
be confirmed). The tails outside the schedule are not drawn. Weight one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, cell_mass


class Config(MethodConfig):
    """`timesteps.kind: cauchy`."""

    kind: Literal["cauchy"] = "cauchy"
    mean: float = Field(0.0, description="centre in log-SNR")
    gamma: float = Field(0.5, gt=0, description="half width at half height, in log-SNR")


def build(config: Config, schedule: Schedule) -> Method:
    """Mass of the law in the cells of log-SNR."""
    density = cell_mass(
        -schedule.log_snr,
        lambda level: ((level + config.mean) / config.gamma).atan() / math.pi + 0.5,
        config.kind,
    )
    return Method(density, torch.ones_like(density))
