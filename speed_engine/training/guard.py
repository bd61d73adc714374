"""When to go back or give up: updates that were refused because their gradients were not finite.

The counting is done on the device with the optimizer's own counter; nothing waits until `verdict` is asked for, once a
line of the log. `rollback.py` then goes back to a checkpoint and leaves the data of those updates out.
"""

from __future__ import annotations

import itertools
import math
from collections import deque

import torch
from torch import Tensor


class Guard:
    """Looks at refused updates: how many in a row, and how many of the last `window`.

    limit: `train.max_bad_steps`. skipped: the engine's count of refused updates so far, a number or a tensor of one
    number on any device. step: finished steps so far. window, most: `train.bad_window`, `train.max_bad_in_window`.
    """

    def __init__(
        self,
        limit: int,
        skipped: Tensor | int,
        step: int = 0,
        window: int = 1000,
        most: int = 1000,
    ) -> None:
        self.limit, self.window, self.most = limit, window, most
        self.told = float(_number(skipped))
        self.step = step  # of the last verdict
        self.counts: list[Tensor] = []  # one an update since then
        self.row: list[int] = []  # refused one after the other, up to now
        self.recent: deque[int] = deque()  # refused, within the window
        self.bad: list[int] = []  # refused since the verdict before
        self.guilty: list[int] = []  # what the verdict is about
        self.looked_at = range(step, step)  # the steps of the last verdict

    @torch.no_grad()
    def update(self, skipped: Tensor | int) -> None:
        """Note the count after one more update. Does not wait for the device."""
        self.counts.append(_number(skipped))

    def verdict(self, loss: float) -> str | None:
        """Why the run cannot go on, else None; `loss` is the mean since the last verdict. Waits for the device.

        Then `bad` holds the steps that were refused since the last verdict (step n is the update after n finished
        ones), and `guilty` those of the reason.
        """
        counts = [self.told, *(torch.stack(self.counts).tolist() if self.counts else ())]
        before, self.step, self.counts = self.step, self.step + len(self.counts), []
        self.looked_at = range(before, self.step)
        self.bad, self.guilty, self.told = [], [], counts[-1]
        reason = None
        for step, (one, other) in enumerate(itertools.pairwise(counts), start=before):
            if other <= one:
                self.row = []
                continue
            self.bad.append(step)
            self.row.append(step)
            self.recent.append(step)
            while self.recent[0] <= step - self.window:
                self.recent.popleft()
            if len(self.row) >= self.limit:
                self.guilty = list(self.row)
                reason = (
                    f"{len(self.row)} updates in a row had gradients that are not finite and were skipped "
                    f"(train.max_bad_steps={self.limit})"
                )
            elif reason is None and len(self.recent) >= self.most:
                self.guilty = list(self.recent)
                reason = (
                    f"{len(self.recent)} of {self.window} updates had gradients that are not finite and were skipped "
                    f"(train.max_bad_in_window={self.most})"
                )
        if reason is None and not self.bad and not math.isfinite(loss):
            self.guilty = list(range(before, self.step))
            reason = "the loss is not finite, and no update was skipped, so the weights are spoilt"
        return reason

    def blame(self, reason: str | None) -> str | None:
        """`reason`, if any, is about all steps that the verdict looked at: a spike of the loss."""
        if reason is not None:
            self.guilty = list(self.looked_at)
            self.bad = sorted({*self.bad, *self.guilty})
        return reason


def _number(skipped: Tensor | int) -> Tensor:
    """A copy that later updates do not change; float64 []."""
    if isinstance(skipped, Tensor):
        return skipped.detach().to(torch.float64, copy=True)
    return torch.tensor(float(skipped), dtype=torch.float64)
