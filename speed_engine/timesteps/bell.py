"""The bell weight of the DiffSynth and Wan trainers: y = exp(-2 ((t - T/2) / T)^2), w = (y - min y)
T / sum, uniform steps.

A re-weighting of rectified flow's own loss that vanishes at both ends and is largest in the middle;
its mean over the steps is one. t / T is the training coordinate as a share of its range (the index,
or flow's t before the resolution shift), at the middle of a row's cell.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig


class Config(MethodConfig):
    """`timesteps.kind: bell`."""

    kind: Literal["bell"] = "bell"


def build(config: Config, schedule: Schedule) -> Method:
    """W = (y - min y) / mean of (y - min y); minimum and mean are the schedule's as configured."""
    plain = schedule.unmoved
    start = plain.coordinate[0] - plain.measure[0] / 2
    length = plain.measure.sum()

    def bell(on: Schedule) -> Tensor:
        return torch.exp(-2 * ((on.coordinate - start) / length - 0.5).square())

    lowest = bell(plain).min()
    mean = (plain.uniform * (bell(plain) - lowest)).sum()
    # Rows that another method's density moved may lie beyond the outermost ones of ours.
    return Method(schedule.uniform, (bell(schedule) - lowest).clamp(min=0) / mean)
