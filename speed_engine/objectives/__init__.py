"""What the network predicts: one file an objective, all of them become one `Objective`.

The target is linear in what was mixed, target = C x0 + D eps, so an objective is two columns over
the rows of a schedule and, for preconditioned networks, the factor by which the network's input is
scaled. It knows no weights and no densities. The word `objective.kind` of a configuration is the
name of a file of this folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from speed_engine.schedules import Schedule


def names() -> list[str]:
    """Every `objective.kind` that exists: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem[0] != "_")


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
