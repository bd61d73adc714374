"""Which few time steps tell most about all of them: univariate regression over the last sweeps, on
the device.

A sweep measures, for one sample, how much the loss at every swept step changed by an update. A step
is a good witness if its change predicts the sum of all changes: the largest F statistic r^2 / (1 -
r^2) (n - 2) of the regression of the sum on it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureSelection:
    """The last `capacity` sweeps over R steps, float64 [capacity, R], and the indices of the best
    `num_best` of them.
    """

    def __init__(self, num_swept: int, num_best: int, capacity: int, device: torch.device) -> None:
        self.num_best = num_best
        self.sweeps = torch.zeros(capacity, num_swept, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        # At first: spread evenly.
        even = (torch.arange(num_best, device=device) * 2 + 1) * num_swept // (2 * num_best)
        self.best = even.clone()

    def add(self, change_R: Tensor) -> None:
        """Note a sweep and choose again; with fewer than three sweeps the choice stays as it was."""
        capacity = self.sweeps.shape[0]
        self.sweeps.index_copy_(0, (self.count % capacity)[None], change_R.double()[None])
        self.count += 1
        chosen = self.statistic().topk(self.num_best).indices.sort().values
        self.best.copy_(torch.where(self.count >= 3, chosen, self.best))

    def statistic(self) -> Tensor:
        """F of every swept step over the sweeps so far; 0 where it did not vary; float64 [R]."""
        capacity = self.sweeps.shape[0]
        num = self.count.clamp(max=capacity)
        known = (torch.arange(capacity, device=self.sweeps.device) < num).double()[:, None]
        total = self.sweeps.sum(dim=1, keepdim=True)
        x = (self.sweeps - (self.sweeps * known).sum(0) / num) * known
        y = (total - (total * known).sum(0) / num) * known
        scale = x.square().sum(0) * y.square().sum(0)
        square = torch.where(scale > 0, (x * y).sum(0).square() / scale, 0.0).clamp(max=1 - 1e-12)
        return square / (1 - square) * (num - 2).clamp(min=0)

    def tensors(self) -> dict[str, Tensor]:
        """The state."""
        return {"sweeps": self.sweeps, "count": self.count, "best": self.best}
