"""What the network predicts: one file an objective, all of them become one `Objective`.

The target is linear in what was mixed, target = C x0 + D eps, so an objective is two columns over
the rows of a schedule and, for preconditioned networks, the factor by which the network's input is
scaled. It knows no weights and no densities. The word `objective.kind` of a configuration is the
name of a file of this folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speed_engine.schedules import Schedule

# The columns of a packed row, in order.
COLUMNS = ("A", "B", "C", "D", "W", "LOGVAR_MIN", "LOGVAR_MAX", "MEAN_GAP")
W = COLUMNS.index("W")


@dataclass(frozen=True)
class Objective:
    """The columns of an objective on one schedule; float64 [T] each.

    target = target_x0 * x0 + target_eps * eps; the network sees input_scale * (alpha x0 + sigma
    eps). `clamp_steps` > 0 asks for FDM's weight warm-up: the loss weight is held below a ceiling
    that grows from 5 to 500.
    """

    kind: str
    target_x0: Tensor
    target_eps: Tensor
    input_scale: Tensor
    clamp_steps: int = 0

    def gain(self, schedule: Schedule) -> Tensor:
        """d target / d x0 at fixed x_t: C - D alpha / sigma; float64 [T].

        An error e of the predicted x0 is an error gain * e of the target, so a weight W on the x0
        error is the weight W / gain^2 on the target's.
        """
        return self.target_x0 - self.target_eps * schedule.alpha / schedule.sigma

    def x0_columns(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """(P, Q) of x0 = P f + Q x_t for a network output f at the unscaled x_t; float64 [T] each.

        Infinite where the target says nothing about x0 (epsilon at zero SNR).
        """
        gain = self.gain(schedule)
        return 1 / gain, -self.target_eps / (schedule.sigma * gain)


def pack(schedule: Schedule, objective: Objective, weight: Tensor) -> Tensor:
    """rows_T8, float32: computed in float64, rounded once.

    Without betas (continuous time) the three columns of the variational term are zero.
    """
    zero = torch.zeros_like(weight)
    log_min, log_max, gap = zero, zero, zero
    if schedule.betas is not None:
        betas, alpha_bar = schedule.betas, schedule.alpha.square()
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        # q(x_{t-1} | x_t, x0): its variance is 0 at row 0, which takes row 1's (improved DDPM).
        variance = betas * (1 - previous) / (1 - alpha_bar)
        variance = torch.cat([variance[1:2], variance[1:]])
        log_min, log_max = variance.log(), betas.log()
        x0_factor = betas * previous.sqrt() / (1 - alpha_bar)
        gap = -x0_factor / objective.gain(schedule)
    scale = objective.input_scale
    inputs = (schedule.alpha * scale, schedule.sigma * scale)
    targets = (objective.target_x0, objective.target_eps)
    return torch.stack([*inputs, *targets, weight, log_min, log_max, gap], dim=1).float()


def weight_ceiling(step: int, clamp_steps: int) -> float | None:
    """FDM's warm-up: the largest weight on the x0 error after `step` steps, 5 * 100^(step /
    clamp_steps); None when over.
    """
    return 5.0 * 100.0 ** (step / clamp_steps) if step < clamp_steps else None
