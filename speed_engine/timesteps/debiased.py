"""Debiased estimation loss (Yu et al. 2023): weight SNR^-1/2 on the eps loss (SNR^1/2 on x0),
uniform steps.

It grows without bound towards noise: on linear DDPM 89 % of the weight falls on log-SNR below -5.
Third-party trainers cap SNR at 1000 (which only touches the clean end) and use 1 / (SNR + 1) for v;
here v follows from the definition.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig


class Config(MethodConfig):
    """`timesteps.kind: debiased`."""

    kind: Literal["debiased"] = "debiased"
    max_snr: float | None = Field(
        None, gt=0, description="cap of SNR in the weight; none by default"
    )


def build(config: Config, schedule: Schedule) -> Method:
    """W_x0 = SNR min(SNR, max_snr)^-1/2, which is W_eps = min(SNR, max_snr)^-1/2."""
    capped = schedule.snr if config.max_snr is None else schedule.snr.clamp(max=config.max_snr)
    weight = capped.sqrt() if config.max_snr is None else schedule.snr / capped.sqrt()
    return Method(schedule.uniform, weight / schedule.sigma_data**2, "x0")
