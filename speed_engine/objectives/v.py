"""Predict v = alpha eps - sigma x0 (Salimans and Ho 2022): well posed at every SNR of a
variance-preserving schedule.
"""

from __future__ import annotations

from typing import Literal

import torch

from speed_engine.kinds import Section
from speed_engine.objectives import Objective
from speed_engine.schedules import Schedule


class Config(Section):
    """`objective.kind: v`."""

    kind: Literal["v"] = "v"


def build(config: Config, schedule: Schedule) -> Objective:
    """C = -sigma, D = alpha. Raises ValueError where alpha^2 + sigma^2 is not 1."""
    norm = schedule.alpha.square() + schedule.sigma.square()
    if (norm - 1).abs().max() > 1e-6:
        raise ValueError(
            f"objective.kind=v needs alpha^2 + sigma^2 = 1, but schedule {schedule.kind} breaks "
            "it; use objective.kind=flow or edm"
        )
    return Objective("v", -schedule.sigma, schedule.alpha, torch.ones_like(schedule.alpha))
