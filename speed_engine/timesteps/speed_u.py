"""SpeeD on any schedule, through the noise fraction u = 1 / (1 + SNR) alone.

What the SpeeD paper says about process increments is a statement about u = 1 - alpha_bar, and u
exists on every schedule (VE and EDM too, where the paper's own recipe finds no areas). Sampling:
steps with 1 - u <= 1/r are k times rarer; r = 139 is the paper's tau = 700 on the linear schedule.
Change-aware factor: du / d(training coordinate), by min-max onto [1 - lam, lam] as in the paper, or
`pure`: proportional to du itself. Since E_t[du/dt f] = E_u f = E f(L) for L ~ Logistic(0, 1) in
log-SNR on every schedule, sampling by du and weighting by du are the same expectation; sampling
wastes no forward passes and is the default.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, normalised
from speed_engine.timesteps.speed import DEFAULT_R, change_aware, step_density, threshold


class Config(MethodConfig):
    """`timesteps.kind: speed_u`."""

    kind: Literal["speed_u"] = "speed_u"
    k: float = Field(5.0, ge=1, description="suppression of the convergence area; 1 = none")
    r: float = Field(DEFAULT_R, gt=1, description="the convergence area is where 1/(1-u) >= r")
    lam: float = Field(
        0.6, ge=0.5, le=1, description="lambda of the min-max factor; unused if pure"
    )
    change_aware: Literal["density", "weight", "off"] = Field(
        "density", description="where the change-aware factor goes: sampling, loss weight, nowhere"
    )
    pure: bool = Field(False, description="the factor is du itself: log-SNR becomes Logistic(0, 1)")
    weight_in: Literal["own", "eps"] = Field("own", description="the loss that a weight belongs to")


def build(config: Config, schedule: Schedule) -> Method:
    """Raises ValueError where the schedule never reaches r (with k = 1 the threshold is not
    needed).
    """
    density, tau = schedule.uniform, None
    if config.k > 1:
        tau = threshold(schedule, None, config.r)
        density = step_density(schedule, tau, config.k)
    factor = change_aware(schedule, config.lam)
    if config.pure:
        plain = schedule.unmoved  # the mean is over its rows, wherever a density moved ours
        mean = (plain.uniform * plain.noise_rate.clamp(min=0)).sum()
        factor = schedule.noise_rate.clamp(min=0) / mean
    weight = torch.ones_like(factor)
    if config.change_aware == "weight":
        weight = factor
    elif config.change_aware == "density":
        density = normalised(density * factor, config.kind)
    return Method(density, weight, config.weight_in, tau, resolved={"tau": tau})
