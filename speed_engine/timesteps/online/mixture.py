"""A density that moves from its start to a target while training runs: (1 - a) start + a target, a
= step / total_steps.
"""

from __future__ import annotations

from torch import Tensor

from speed_engine.timesteps.online import Columns, Observations, Online


class Mixture(Online):
    """A function of the step alone: it looks at no losses and has no state of its own."""

    needs_losses = False

    def __init__(self, target: Tensor, total_steps: int, every: int) -> None:
        """`target` is float64 [T]; it need not be normalised against the start's mass of one."""
        self.target, self.total_steps, self.every = target, total_steps, every

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        self.initial = columns.density_T.clone()
        self.target = self.target.to(self.initial.device)

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        share = min(1.0, step / self.total_steps)
        return (1 - share) * self.initial + share * self.target, None

    def tensors(self) -> dict[str, Tensor]:
        return {}
