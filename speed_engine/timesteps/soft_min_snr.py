"""Soft-Min-SNR weighting (Crowson et al. 2024, HDiT): a smooth peak at SNR = 1, uniform steps.

Stated on EDM's F-target: (s sd)^2 / (s^2 + sd^2)^2 with s = sigma / alpha; on x0 that is 1 / (s^2 +
sd^2), and with sd = 1 it is SNR / (1 + SNR)^2 on v. Default sigma_data = 1, as in the authors'
code.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig


class Config(MethodConfig):
    """`timesteps.kind: soft_min_snr`."""

    kind: Literal["soft_min_snr"] = "soft_min_snr"
    sigma_data: float = Field(1.0, gt=0, description="where the peak is: s = sigma_data")


def build(config: Config, schedule: Schedule) -> Method:
    """W_x0 = alpha^2 / (sigma^2 + (sigma_data alpha)^2)."""
    signal = schedule.alpha.square()
    weight = signal / (schedule.sigma.square() + config.sigma_data**2 * signal)
    return Method(schedule.uniform, weight, "x0")
