"""When to give up: updates that were refused one after the other because their gradients were not finite.

The counting is done on the device with the optimizer's own counter; nothing waits until `verdict` is asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Guard:
    """Counts refused updates in a row; an applied one starts the count again.

    limit: `train.max_bad_steps`. skipped: the engine's count of refused updates so far, a number or a tensor of one
    number on any device.
    """

    def __init__(self, limit: int, skipped: Tensor | int) -> None:
        self.limit = limit
        self.before = _number(skipped)
        self.streak = torch.zeros_like(self.before)  # up to now
        self.worst = torch.zeros_like(self.before)  # the longest since the last verdict
        self.told = int(self.before)

    @torch.no_grad()
    def update(self, skipped: Tensor | int) -> None:
        """Note the count after one more update. Does not wait for the device."""
        now = _number(skipped)
        refused = now > self.before.to(now.device)
        self.streak = (self.streak.to(now.device) + 1) * refused
        self.worst = torch.maximum(self.worst.to(now.device), self.streak)
        self.before = now

    def verdict(self, loss: float) -> str | None:
        """Why the run cannot go on, else None; `loss` is the mean since the last verdict. Waits for the device."""
        worst, skipped = int(self.worst), int(self.before)
        newly, self.told, self.worst = skipped - self.told, skipped, torch.zeros_like(self.worst)
        if worst >= self.limit:
            return (
                f"{worst} updates in a row had gradients that are not finite and were skipped "
                f"(train.max_bad_steps={self.limit})"
            )
        if not newly and not math.isfinite(loss):
            return "the loss is not finite, and no update was skipped, so the weights are spoilt"
        return None


def _number(skipped: Tensor | int) -> Tensor:
    """A copy that later updates do not change; float64 []."""
    if isinstance(skipped, Tensor):
        return skipped.detach().to(torch.float64, copy=True)
    return torch.tensor(float(skipped), dtype=torch.float64)
