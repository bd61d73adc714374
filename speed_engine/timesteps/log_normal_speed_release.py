"""The "Log-Normal" baseline of the SpeeD release: neither Karras' nor Esser's.

It evaluates the density of logit-normal(0, 1) at n = sqrt(1 - alpha_bar) of every step, times n /
(1 - n), without the Jacobian dn/dt. On linear DDPM it peaks at step 348 and gives the steps from
700 on 5.4e-5 of the draws: they are never trained. The methods themselves are `log_normal` and
`logit_normal`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, normalised, require_discrete


class Config(MethodConfig):
    """`timesteps.kind: log_normal_speed_release`."""

    kind: Literal["log_normal_speed_release"] = "log_normal_speed_release"


def build(config: Config, schedule: Schedule) -> Method:
    """P(t) ~ exp(-logit(n)^2 / 2) / (1 - n)^2. Raises ValueError on continuous schedules."""
    require_discrete(config.kind, schedule)
    # 1 - n without cancellation: (1 - n^2) / (1 + n), and n^2 = 1 - alpha_bar.
    rest = schedule.alpha.square() / (1 + schedule.sigma)
    logit = schedule.sigma.log() - rest.log()
    # In logarithms, so that a step at zero SNR has mass 0 instead of 0 * infinity.
    log_mass = -logit.square() / 2 - 2 * rest.log() - math.log(2 * math.pi) / 2
    mass = torch.where(rest > 0, log_mass.exp(), torch.zeros_like(rest))
    return Method(normalised(mass, config.kind), torch.ones_like(mass))
