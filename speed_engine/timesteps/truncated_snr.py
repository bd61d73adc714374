"""SNR truncation (Salimans and Ho 2022, section 4): weight max(SNR, 1) on the x0 loss, uniform
steps.
"""

from __future__ import annotations

from typing import Literal

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig


class Config(MethodConfig):
    """`timesteps.kind: truncated_snr`."""

    kind: Literal["truncated_snr"] = "truncated_snr"


def build(config: Config, schedule: Schedule) -> Method:
    """W_x0 = max(SNR, 1) / sigma_data^2; max(1, 1 / SNR) on eps."""
    return Method(schedule.uniform, schedule.snr.clamp(min=1) / schedule.sigma_data**2, "x0")
