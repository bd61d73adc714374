"""EDM's preconditioned network F (Karras et al. 2022, eq. 7 and table 1).

With s = sigma / alpha: D(x) = c_skip x + c_out F(c_in x), c_skip = sd^2 / (s^2 + sd^2), c_out = s
sd / sqrt(s^2 + sd^2), c_in = 1 / sqrt(s^2 + sd^2). The target of F is (x0 - c_skip x) / c_out;
weight 1 on it is EDM's weight 1 / c_out^2 on the error of D. sd is the schedule's sigma_data.
Schedules that scale x0 (alpha below 1) are divided by alpha first.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from speed_engine.kinds import Section
from speed_engine.objectives import Objective
from speed_engine.schedules import Schedule


class Config(Section):
    """`objective.kind: edm`."""

    kind: Literal["edm"] = "edm"


def build(config: Config, schedule: Schedule) -> Objective:
    """Raises ValueError on a schedule with a row of zero SNR."""
    sigma, target_x0, target_eps = preconditioned_target(schedule, config.kind)
    c_in = 1 / (sigma.square() + schedule.sigma_data**2).sqrt()
    return Objective("edm", target_x0, target_eps, input_scale=c_in / schedule.alpha)


def preconditioned_target(schedule: Schedule, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(s, C, D) of F's target C x0 + D eps; float64 [T] each. `kind` is the objective, for the error."""
    if (schedule.alpha == 0).any():
        raise ValueError(
            f"objective.kind={kind} is not defined at zero SNR; use schedule.zero_terminal_snr=false"
        )
    sigma, data = schedule.sigma / schedule.alpha, schedule.sigma_data
    total = sigma.square() + data**2
    c_skip, c_out = data**2 / total, sigma * data / total.sqrt()
    return sigma, (1 - c_skip) / c_out, -c_skip * sigma / c_out
