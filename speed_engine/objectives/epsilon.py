"""Predict the noise (Ho et al. 2020): target = eps. At zero SNR the target says nothing about x0,
so that is refused.
"""

from __future__ import annotations

from typing import Literal

import torch

from speed_engine.kinds import Section
from speed_engine.objectives import Objective
from speed_engine.schedules import Schedule


class Config(Section):
    """`objective.kind: epsilon`."""

    kind: Literal["epsilon"] = "epsilon"


def build(config: Config, schedule: Schedule) -> Objective:
    """C = 0, D = 1. Raises ValueError on a schedule with a row of zero SNR."""
    if (schedule.alpha == 0).any():
        raise ValueError(
            "objective.kind=epsilon cannot be trained at zero SNR; use objective.kind=v or "
            "schedule.zero_terminal_snr=false"
        )
    one = torch.ones_like(schedule.alpha)
    return Objective("epsilon", target_x0=0 * one, target_eps=one, input_scale=one)
