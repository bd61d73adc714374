"""Parts that choose the row of every sample by looking at the sample, and learn from the network
before and after an update.

Only `adaptive` does so today. The training loop gives them a way to run the network (`Evaluate`)
and to reach the other ranks.

Shape legend: B samples of a rank's micro-batch, N samples of one evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from speed_engine.timesteps.online import Online
from speed_engine.timesteps.online.buffer import AllReduce

# (x0 [N, ...], the network's conditions by name, row_N int64, first slot) -> unweighted mse_N float32,
# without gradients. The noise is a function of the step and the slot, so equal calls compare equal draws.
Evaluate = Callable[[Tensor, Mapping[str, Tensor], Tensor, int], Tensor]


@dataclass(frozen=True)
class Reach:
    """The ranks that train together; rank 0 holds slot 0 of the global batch."""

    rank: int = 0
    num_ranks: int = 1
    all_reduce: AllReduce | None = None


ALONE = Reach()


class Policy(Online):
    """A part that draws. `before` and `after` surround the optimizer's update, on every rank alike."""

    def draw(self, x0: Tensor, word_B: Tensor) -> Tensor:
        """The row of every sample, int64 [B], from a random 32-bit word each (int64 [B])."""
        raise NotImplementedError

    def due(self, step: int) -> bool:
        """Whether `before` and `after` want to see the update that follows `step` finished steps."""
        raise NotImplementedError

    def before(
        self,
        step: int,
        x0: Tensor,
        conditions: Mapping[str, Tensor],
        row_B: Tensor,
        evaluate: Evaluate,
        reach: Reach,
    ) -> None:
        """Measure the network before the update, on a batch that it is made from."""
        raise NotImplementedError

    def after(self, evaluate: Evaluate, reach: Reach) -> None:
        """Measure it again on the same draws, and learn."""
        raise NotImplementedError
