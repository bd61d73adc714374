"""Min-SNR-gamma weighting (Hang et al. 2023, eq. 10): weight min(SNR, gamma) on the x0 loss,
uniform steps.

That is min(1, gamma / SNR) for eps and min(SNR, gamma) / (SNR + 1) for v; at zero SNR the weight is
1, as in the authors' code. Default gamma = 5. The authors' function `min_snr` divides by SNR for v
too (its `vmin_snr` is right); the SpeeD release's Min-SNR is 5 x P2, see `min_snr_speed_release`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig


class Config(MethodConfig):
    """`timesteps.kind: min_snr`."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = Field(5.0, gt=0, description="SNR above which the weight stops growing")


def build(config: Config, schedule: Schedule) -> Method:
    """W_x0 = sigma_data^-2 min(SNR, gamma); 1 at zero SNR, where every target's gain is 1."""
    weight = schedule.snr.clamp(max=config.gamma) / schedule.sigma_data**2
    weight = torch.where(schedule.snr == 0, torch.ones_like(weight), weight)
    return Method(schedule.uniform, weight, "x0")
