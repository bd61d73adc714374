"""Predict the velocity of rectified flow, dx/dt = eps - x0 (Liu et al. 2023)."""

from __future__ import annotations

from typing import Literal

import torch

from speed_engine.kinds import Section
from speed_engine.objectives import Objective
from speed_engine.schedules import Schedule


class Config(Section):
    """`objective.kind: flow`."""

    kind: Literal["flow"] = "flow"


def build(config: Config, schedule: Schedule) -> Objective:
    """C = -1, D = 1. Raises ValueError where alpha + sigma is not 1."""
    if (schedule.alpha + schedule.sigma - 1).abs().max() > 1e-6:
        raise ValueError(
            f"objective.kind=flow needs x = (1 - t) x0 + t eps, which schedule {schedule.kind} is "
            "not; use schedule.kind=rectified_flow, or objective.kind=v"
        )
    one = torch.ones_like(schedule.alpha)
    return Objective("flow", target_x0=-one, target_eps=one, input_scale=one)
