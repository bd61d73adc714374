"""SpeeD as in the paper (Wang et al. 2024, arXiv 2405.17403): asymmetric sampling and change-aware
weighting.

Sampling, eq. 3: steps before the threshold tau are drawn k times as often as those from tau on,
P(t) = k / (T + tau (k - 1)) for t <= tau, 1 / (T + tau (k - 1)) above. Weighting, section 2.6: the
growth of the noise d(1 - alpha_bar)/dt scaled by min-max onto [1 - lam, lam]; Theorem 1's factor 2
drops out, and the paper's clamps of the ends to [0, 1] never act on a discrete schedule. Defaults k
= 5 and lam = 0.6 (tables 6b, 6c), tau = 700 of 1000 (released settings). The released code does
something else: see `speed_official`.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, WeightIn, minmax, normalised

# The magnitude that the paper's tau = 700 corresponds to on the linear schedule (138.6 in closed
# form).
DEFAULT_R = 139.0


class Config(MethodConfig):
    """`timesteps.kind: speed`. The threshold is `tau` (a row) or `r` (a magnitude), never both."""

    kind: Literal["speed"] = "speed"
    k: float = Field(5.0, ge=1, description="suppression: how much rarer the steps from tau on are")
    lam: float = Field(0.6, ge=0.5, le=1, description="lambda, the largest weight; 0.5 = none")
    tau: int | None = Field(
        None, ge=1, description="first suppressed row (0-based); default 0.7 T, the paper's 700"
    )
    r: float | None = Field(
        None, gt=1, description="suppress where 1/alpha_bar >= r, on any schedule"
    )
    change_aware: Literal["weight", "density", "off"] = Field(
        "weight",
        description="where the change-aware factor goes: into the loss, into the sampling, nowhere",
    )
    weight_in: Literal["own", "eps"] = Field(
        "own",
        description="the weight multiplies the objective's own loss, or is converted from eps",
    )

    @model_validator(mode="after")
    def _one_threshold(self) -> Config:
        if self.tau is not None and self.r is not None:
            raise ValueError(
                "timesteps.tau and timesteps.r both name the threshold; give one of them"
            )
        return self


def build(config: Config, schedule: Schedule) -> Method:
    """Eq. 3 and section 2.6 on any schedule. Raises ValueError where the threshold is not on the
    schedule.
    """
    tau = threshold(schedule, config.tau, config.r)
    density = step_density(schedule, tau, config.k)
    factor = change_aware(schedule, config.lam)
    weight = torch.ones_like(factor)
    if config.change_aware == "weight":
        weight = factor
    elif config.change_aware == "density":
        density = normalised(density * factor, config.kind)
    weight_in: WeightIn = config.weight_in
    return Method(density, weight, weight_in, tau, resolved={"tau": tau})


def threshold(schedule: Schedule, tau: int | None, r: float | None) -> int:
    """The first suppressed row, in 1 .. T: `tau` itself, or where the true 1/alpha_bar reaches `r` (0
    only where another method's density left no row below).

    Default: 0.7 T on a discrete schedule (the paper's and the release's 700), r = 139 on a
    continuous one. Raises ValueError where `tau` is above T, or a row number is given for
    continuous time, or `r` is never or at once reached.
    """
    if tau is None and r is None:
        if not schedule.continuous:
            return max(1, round(0.7 * schedule.num_rows))
        r = DEFAULT_R
    if tau is not None:
        if schedule.continuous:
            raise ValueError(
                f"timesteps.tau={tau} counts steps, but schedule {schedule.kind} is continuous; "
                "give timesteps.r instead"
            )
        if tau > schedule.num_rows:
            raise ValueError(
                f"timesteps.tau={tau} is above the schedule's {schedule.num_rows} steps; give "
                f"1 to {schedule.num_rows}"
            )
        return tau
    if schedule.unmoved.first_row(float(r or 0)) == 0:
        raise ValueError(f"timesteps.r={r:g} suppresses every step of {schedule.kind}; raise it")
    # Rows that another method's density moved may all lie on one side.
    return int((schedule.alpha_bar * float(r or 0) > 1).sum())


def step_density(schedule: Schedule, tau: int, k: float) -> Tensor:
    """Eq. 3: rows below tau weigh k, the others 1; float64 [T], sums to one."""
    mass = schedule.measure.clone()
    mass[:tau] *= k
    return mass / mass.sum()


def change_aware(schedule: Schedule, lam: float) -> Tensor:
    """Section 2.6: (1 - lam) + (2 lam - 1) minmax(du/dt), in [1 - lam, lam]; float64 [T]."""
    # The ends are the schedule's: a density may have moved the rows away from them.
    return (1 - lam) + (2 * lam - 1) * minmax(schedule.noise_rate, schedule.unmoved.noise_rate)
