"""CLTS (Xu et al. 2024, arXiv 2404.07946): a curriculum from uniform steps to a Gaussian around the
harder ones.

P(t) = (1 - a) U(t) + a N(t; mu, sigma^2) with a rising from 0 to 1 over `total_steps` steps. t is
the training coordinate as a share of its range. Defaults mu = 0.3 (a reviewer of the SpeeD paper
names 0.3 T; its release has 300) and total_steps = 50000 (the release). sigma is not known: the
release's prefactor implies T, which would be nearly uniform; 0.2 leaves 2.4 % of the final Gaussian
above 0.7 T, 0.3 leaves 9.8 %. The paper's other half (momentum decay with a compensated learning
rate) belongs to the optimizer. The SpeeD release's CLTS is a spike, see `clts_speed_release`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, normalised
from speed_engine.timesteps.log_normal import normal_cdf
from speed_engine.timesteps.online.mixture import Mixture


class Config(MethodConfig):
    """`timesteps.kind: clts`."""

    kind: Literal["clts"] = "clts"
    mu: float = Field(0.3, ge=0, le=1, description="centre of the Gaussian, a share of T")
    sigma: float = Field(0.2, gt=0, description="its standard deviation, a share of T")
    total_steps: int = Field(50_000, ge=1, description="training steps until only it is left")
    every: int = Field(100, ge=1, description="training steps between two updates of the table")


def build(config: Config, schedule: Schedule) -> Method:
    """Starts uniform; see `online.mixture`."""
    target = gaussian(schedule, config.mu, config.sigma)
    return Method(
        schedule.uniform,
        torch.ones_like(target),
        online=Mixture(target, config.total_steps, config.every),
    )


def gaussian(schedule: Schedule, mu: float, sigma: float) -> Tensor:
    """N(mu, sigma^2) over the share of the coordinate's range, cut at both ends; float64 [T]."""
    return normalised(normal_cdf((schedule.share_edges - mu) / sigma).diff(), "clts")
