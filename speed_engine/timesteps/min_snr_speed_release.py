"""The "Min-SNR" baseline of the SpeeD release, which is not Min-SNR: 5 / (1 + SNR), exactly 5 times
P2 with k = gamma = 1.

The code divides by SNR + 1 (the form for v) although the network predicts eps, and takes element 0
of the minimum over the table, min(SNR_0, gamma) = gamma, for every step. Only good for reproducing
that table; the method itself is `min_snr`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig


class Config(MethodConfig):
    """`timesteps.kind: min_snr_speed_release`."""

    kind: Literal["min_snr_speed_release"] = "min_snr_speed_release"
    gamma: float = Field(5.0, gt=0, description="SNR above which the weight stops growing")


def build(config: Config, schedule: Schedule) -> Method:
    """W_eps = min(SNR_0, gamma) / (SNR + 1)."""
    first = schedule.snr[0].clamp(max=config.gamma)
    return Method(schedule.uniform, first / (schedule.snr + 1), "eps")
