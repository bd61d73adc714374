"""Collects the losses of the global batch on the device, so that a refresh sees the same numbers on
every rank.

Every rank writes its samples at their place (step, global slot); one sum over the ranks at the
refresh completes the picture. The result therefore does not depend on how the batch was cut into
ranks and micro-batches, and a run resumes exactly in the middle of an interval: the completed part
is saved and kept apart from what a rank adds later.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from speed_engine.timesteps.online import Observations

AllReduce = Callable[[Tensor], object]

ROW, MSE, VB = 0, 1, 2


class Buffer:
    """float32 [3, every, num_slots]: row + 1 (0 = empty), mse, vb of every sample since the last
    refresh.
    """

    def __init__(self, every: int, num_slots: int, device: torch.device) -> None:
        self.every, self.num_slots = every, num_slots
        self.mine = torch.zeros(3, every * num_slots, dtype=torch.float32, device=device)
        self.past = torch.zeros_like(self.mine)  # of all ranks, from before the run was resumed
        self.filled = False  # whether anything was observed since the last refresh (host knowledge)

    def write(self, address_2: Tensor, row_B: Tensor, losses_3B: Tensor) -> None:
        """Store a micro-batch; address_2 is int64 (step, first global slot). Losses that are not
        finite are left out.
        """
        self.filled = True
        losses_3B = losses_3B.detach()
        start = address_2[0] % self.every * self.num_slots + address_2[1]
        place_B = start + torch.arange(row_B.shape[0], device=row_B.device)
        finite_B = losses_3B[1:].isfinite().all(dim=0)
        columns = torch.stack((row_B.float() + 1, losses_3B[1].float(), losses_3B[2].float()))
        self.mine.index_copy_(1, place_B, torch.where(finite_B, columns, 0.0))

    def complete(self, all_reduce: AllReduce | None) -> Tensor:
        """Everything that all ranks observed in this interval; [3, every * num_slots]. One sum over
        the ranks.
        """
        total = self.mine.clone()
        if all_reduce is not None:
            all_reduce(total)
        return total + self.past

    def take(self, all_reduce: AllReduce | None) -> Observations:
        """The complete interval; the buffer is empty afterwards."""
        total = self.complete(all_reduce)
        self.mine.zero_()
        self.past.zero_()
        self.filled = False
        seen_N = total[ROW] > 0
        row_N = (total[ROW].long() - 1).clamp_min(0)
        return Observations(row_N, total[MSE].double(), total[VB].double(), seen_N, self.every)

    def restore(self, complete: Tensor) -> None:
        """Continue an interval of which `complete` was saved."""
        self.past.copy_(complete)
        self.mine.zero_()
        self.filled = True


def nothing(every: int, device: torch.device) -> Observations:
    """An interval of which nobody wanted to know the losses."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Observations(none, none.double(), none.double(), none.bool(), every)
