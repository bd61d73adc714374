"""SpeeD as its code was released (NUS-HPC-AI-Lab/SpeeD, f5650f9), which differs from the paper
(`speed`) in two ways.

Sampling: half of every batch is drawn from eq. 3, the other half mirrors it about the step m where
sqrt(1 - alpha_bar) stops growing by 1e-4 a step (t -> m - t below m, t - m from m on). Hence the
real ratio of inside to outside is 10:1 to 11.8:1 at k = 5, not 5:1, and steps from tau = 700 on get
3.95 % of the draws instead of 7.89 %. Weighting: from tau on the weight is 1 instead of about 1 -
lam. This table has the released marginal density; that the mirrored half depends on the other half
of the same batch is not reproduced. The weight belongs to the epsilon MSE alone, as there. The
release's own defaults k = 1 and lam = 5 give negative weights; ours are its configurations' k = 5,
lam = 0.6, tau = 700 (on every schedule).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, require_discrete
from speed_engine.timesteps.speed import change_aware, step_density, threshold

GROWTH = 1e-4  # of sqrt(1 - alpha_bar) per step, below which the release calls steps meaningless


class Config(MethodConfig):
    """`timesteps.kind: speed_official`."""

    kind: Literal["speed_official"] = "speed_official"
    k: float = Field(5.0, ge=1, description="how much more often the kept steps are drawn")
    lam: float = Field(
        0.6, ge=0.5, le=1, description="lambda, the ends of the weights are 1 - lambda and lambda"
    )
    tau: int | None = Field(None, ge=1, description="default 0.7 T, the release's 700")
    mirror: bool = Field(True, description="the mirrored half; off is the release's `no_dual`")


def build(config: Config, schedule: Schedule) -> Method:
    """Raises ValueError on continuous schedules, and where the schedule never stops growing."""
    require_discrete(config.kind, schedule)
    tau = threshold(schedule, config.tau, None)
    density = step_density(schedule, tau, config.k)
    middle = mirror_step(schedule)
    if config.mirror:
        density = (density + mirrored(density, middle)) / 2
    weight = change_aware(schedule, config.lam)
    weight[tau:] = 1
    return Method(density, weight, tau=tau, resolved={"tau": tau, "mirror_step": middle})


def mirror_step(schedule: Schedule) -> int:
    """m: one more than the first row where d sqrt(1 - alpha_bar) / dt < 1e-4; 642 on linear DDPM."""
    (growth,) = torch.gradient(schedule.sigma)
    below = torch.nonzero(growth < GROWTH)
    if below.numel() == 0:
        raise ValueError(
            f"timesteps.kind=speed_official: sqrt(1 - alpha_bar) of schedule {schedule.kind} grows by "
            "1e-4 at every step, so there is no step to mirror about; use timesteps.kind=speed"
        )
    return int(below[0].item()) + 1


def mirrored(density: Tensor, middle: int) -> Tensor:
    """The density of t -> m - t (t < m), t - m (t >= m) for t drawn from `density`; float64 [T]."""
    step = torch.arange(density.numel())
    target = torch.where(step < middle, middle - step, step - middle)
    return torch.zeros_like(density).index_add_(0, target, density)
