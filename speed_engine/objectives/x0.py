"""Predict the clean sample: target = x0."""

from __future__ import annotations

from typing import Literal

import torch

from speed_engine.kinds import Section
from speed_engine.objectives import Objective
from speed_engine.schedules import Schedule


class Config(Section):
    """`objective.kind: x0`."""

    kind: Literal["x0"] = "x0"


def build(config: Config, schedule: Schedule) -> Objective:
    """C = 1, D = 0."""
    one = torch.ones_like(schedule.alpha)
    return Objective("x0", target_x0=one, target_eps=0 * one, input_scale=one)
