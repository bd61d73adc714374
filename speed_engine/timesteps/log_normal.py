"""Log-normal noise levels (Karras et al. 2022): ln sigma ~ N(mean, std^2), defaults -1.2 and 1.2,
weight one.

On another schedule a level has to be matched by something, and the choices are very different
(steps at 5/25/50/75/95 % of linear DDPM): `log_snr`, the default, compares signal to noise ratios,
sigma -> sigma / sigma_data, 21/78/171/317/541; `sigma` takes sigma / alpha as it is. A step's
probability is the mass of the levels nearest to it; the levels outside the schedule are not drawn.
The SpeeD release's Log-Normal is neither, see `log_normal_speed_release`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, cell_mass


class Config(MethodConfig):
    """`timesteps.kind: log_normal`."""

    kind: Literal["log_normal"] = "log_normal"
    mean: float = Field(-1.2, description="mean of ln sigma")
    std: float = Field(1.2, gt=0, description="standard deviation of ln sigma")
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of x0 that `mean` is for")
    by: Literal["log_snr", "sigma"] = Field("log_snr", description="what a step is matched by")


def build(config: Config, schedule: Schedule) -> Method:
    """Mass of N(mean, std^2) in the cells of ln sigma."""
    density = level_density(schedule, config.mean, config.std, config.sigma_data, config.by)
    return Method(density, torch.ones_like(density))


def level_density(
    schedule: Schedule, mean: float, std: float, sigma_data: float, by: str = "log_snr"
) -> Tensor:
    """ln sigma ~ N(mean, std^2) on a schedule; float64 [T]. Raises ValueError where nothing falls
    on it.
    """
    if by == "sigma":
        level = (schedule.sigma / schedule.alpha).log()
    else:
        level = -schedule.log_snr / 2 + math.log(sigma_data)
    return cell_mass(level, lambda x: normal_cdf((x - mean) / std), "log_normal")


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), accurate in the lower tail."""
    return torch.special.ndtr(x)
