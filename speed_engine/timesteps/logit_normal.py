"""Logit-normal times (Esser et al. 2024, SD3): logit t ~ N(mean, std^2), defaults 0 and 1, weight
one.

t is rectified flow's. On another schedule `by` says what stands for it, and the choices are very
different (steps at 5/25/50/75/95 % of linear DDPM): `index`, the training coordinate as a share of
its range, 161/337/500/662/838; `log_snr`, the signal to noise ratio of flow at t, L = -2 logit t,
55/147/258/392/571; `sigma`, the same without dividing by sigma_data. On rectified flow itself all
three agree. Mass above t = 0.7 T: 0.198 by index, 0.0065 by log-SNR.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, cell_mass, normalised
from speed_engine.timesteps.log_normal import normal_cdf


class Config(MethodConfig):
    """`timesteps.kind: logit_normal`."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = Field(0.0, description="mean of logit t; positive = noisier")
    std: float = Field(1.0, gt=0, description="standard deviation of logit t")
    by: Literal["index", "log_snr", "sigma"] = Field("index", description="what stands for t")


def build(config: Config, schedule: Schedule) -> Method:
    """Mass of the law in every cell."""
    if config.by == "index":
        edges = schedule.share_edges.logit()
        density = normalised(normal_cdf((edges - config.mean) / config.std).diff(), config.kind)
    else:
        level = -schedule.log_snr / 2
        if config.by == "sigma":
            level = (schedule.sigma / schedule.alpha).log()
        density = cell_mass(
            level, lambda x: normal_cdf((x - config.mean) / config.std), config.kind
        )
    return Method(density, torch.ones_like(density))
