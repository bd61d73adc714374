"""P2 weighting (Choi et al. 2022, eq. 8): weight (k + SNR)^-gamma on the eps loss, uniform steps.

Defaults k = 1 and gamma = 1 (the paper uses gamma 1 and 0.5; its code defaults to gamma = 0, which
is off). The weight belongs to the MSE alone; the authors' recipe also rescales the variational term
by T / 1000.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig


class Config(MethodConfig):
    """`timesteps.kind: p2`."""

    kind: Literal["p2"] = "p2"
    k: float = Field(1.0, gt=0, description="added to SNR, so that the weight stays finite")
    gamma: float = Field(1.0, ge=0, description="0 = no weighting")


def build(config: Config, schedule: Schedule) -> Method:
    """W_eps = (k + SNR)^-gamma; at k = gamma = 1 it is u = 1 - alpha_bar."""
    weight = (config.k + schedule.snr) ** -config.gamma
    return Method(schedule.uniform, weight, "eps")
