"""EDM's training distribution and weight (Karras et al. 2022, table 1 and eq. 8).

ln sigma ~ N(p_mean, p_std^2) with p_mean = -1.2, p_std = 1.2, and the weight lambda = (sigma^2 +
sd^2) / (sigma sd)^2 = 1 / c_out^2 on the error of the denoised x0; as an eps weight it is 1 +
sigma^2 / sd^2, on EDM's own F-target 1. sd = 0.5. On a schedule whose x0 has another standard
deviation the levels are compared by SNR, sigma -> sigma / sd, see `log_normal`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig
from speed_engine.timesteps.log_normal import level_density


class Config(MethodConfig):
    """`timesteps.kind: edm`."""

    kind: Literal["edm"] = "edm"
    p_mean: float = Field(-1.2, description="mean of ln sigma")
    p_std: float = Field(1.2, gt=0, description="standard deviation of ln sigma")
    sigma_data: float = Field(0.5, gt=0, description="sd that p_mean was stated for")


def build(config: Config, schedule: Schedule) -> Method:
    """Log-normal density; W_x0 = 1 / sigma^2 + 1 / sd^2 with sigma and sd in the schedule's units."""
    density = level_density(schedule, config.p_mean, config.p_std, config.sigma_data)
    return Method(density, denoiser_weight(schedule), "x0")


def denoiser_weight(schedule: Schedule) -> Tensor:
    """1 / sigma^2 + 1 / sd^2 = 1 / c_out^2, the weight on the error of x0; float64 [T]."""
    sigma = schedule.sigma / schedule.alpha
    return 1 / sigma.square() + schedule.sigma_data**-2
