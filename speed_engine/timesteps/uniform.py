"""Uniform time steps, weight one: the baseline. Uniform in the schedule's training coordinate
(index, t, or ln sigma).
"""

from __future__ import annotations

from typing import Literal

import torch

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig


class Config(MethodConfig):
    """`timesteps.kind: uniform`."""

    kind: Literal["uniform"] = "uniform"


def build(config: Config, schedule: Schedule) -> Method:
    """P(t) = 1 / T, w(t) = 1."""
    return Method(schedule.uniform, torch.ones_like(schedule.alpha))
