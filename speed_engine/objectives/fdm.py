"""Fast Diffusion Model on EDM (Wu et al. 2023): the input scale of a critically damped oscillator,
and a weight warm-up.

c_in is replaced by s = (1 + m B) exp(-m B), B = beta_min t' + beta_d t'^2 / 2, t' = (sigma -
sigma_lo) / (sigma_hi - sigma_lo) with the ends of the schedule as it was configured; everything else
of EDM stays. The loss weight on the error of D
is held below a ceiling growing from 5 to 500 over `clamp_steps`.

Under EDM's own noise levels s differs from 1 by more than 5 % for 0.16 % of the samples (m = 2), so
in effect this is "EDM with c_in = 1 and a weight warm-up" (84 % of the samples are clamped at the
start). The two can be ablated: `input_scale: unit` and `clamp_steps: 0`. Defaults of the released
code: m = 2, ceiling over 400 steps (200 for CIFAR-10, 800 for FFHQ).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.kinds import Section
from speed_engine.objectives import Objective
from speed_engine.objectives.edm import preconditioned_target
from speed_engine.schedules import Schedule


class Config(Section):
    """`objective.kind: fdm`."""

    kind: Literal["fdm"] = "fdm"
    multiplier: float = Field(2.0, gt=0, description="m, the strength of the momentum")
    beta_min: float = Field(0.1, ge=0, description="of the time that the momentum decays with")
    beta_d: float = Field(19.9, ge=0, description="beta_max - beta_min of it")
    input_scale: Literal["momentum", "unit", "edm"] = Field(
        "momentum", description="momentum: FDM's s; unit: 1; edm: EDM's c_in"
    )
    clamp_steps: int = Field(400, ge=0, description="length of the weight warm-up; 0 = none")


def build(config: Config, schedule: Schedule) -> Objective:
    """Raises ValueError on a schedule with a row of zero SNR, and for `momentum` one that reaches it."""
    sigma, target_x0, target_eps = preconditioned_target(schedule, config.kind)
    if config.input_scale == "momentum":
        scale = momentum(config, schedule, sigma)
    elif config.input_scale == "unit":
        scale = torch.ones_like(sigma)
    else:
        scale = 1 / (sigma.square() + schedule.sigma_data**2).sqrt()
    return Objective("fdm", target_x0, target_eps, scale / schedule.alpha, config.clamp_steps)


def momentum(config: Config, schedule: Schedule, sigma: Tensor) -> Tensor:
    """s at each row's sigma / alpha; float64 [T]. Raises ValueError where that has no upper end."""
    # Of the schedule, not of its rows: a time-step method may have moved those.
    low, high = schedule.ratio_range
    if not math.isfinite(high):
        raise ValueError(
            f"objective.kind={config.kind} is not defined at zero SNR, which schedule {schedule.kind} reaches; "
            "choose schedule edm, ve or a discrete one, or objective.input_scale=unit or edm"
        )
    time = (sigma - low) / (high - low)
    b = config.multiplier * (config.beta_min * time + config.beta_d * time.square() / 2)
    return (1 + b) * torch.exp(-b)
