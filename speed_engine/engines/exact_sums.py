"""`train.exact_sums`: one fixed binary tree of sums, so that 1, 2, 4 ... processes add up the same bits.

A float sum depends on its order. Here its leaves are the gradients of the step's L micro-batches of m samples, L a
power of two, and its order is that of a tree over the leaves' numbers alone: first the pairs of leaves whose numbers
differ in the highest bit are added, then the pairs of pairs that differ in the next, and in the lowest bit at last.
Of W processes (W a power of two) each holds the leaves whose number has its rank in the low bits, that is a whole
subtree: what a process adds by itself, and what processes add to each other's, are the same sums for every W.

    memory    4 bytes a parameter for each of log2(L / W) + 1 partial sums, and 2 for what arrives from others
    bytes     2 * 4 * (1 - 1/W) a parameter sent by each process in a step, in float32: those of any all-reduce (halves
              are exchanged and added, then collected), but none of it hides behind the backward pass
    compute   micro-batches of m samples, and one pass over the gradient after each

The leaves must be the same, too: a micro-batch of the same m samples through the same kernels, which must repeat
themselves. On CPUs that includes the number of threads, which this mode sets to OMP_NUM_THREADS, or one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from speed_kernels.adamw_ema import flat
from torch import Tensor

from speed_engine.distributed import Processes
from speed_engine.engines.master_weights import Masters

T = TypeVar("T")


def refuse_what_has_no_tree(global_batch: int, micro_batch: int | None, world: int) -> None:
    """Raise ValueError, with the cure, where the batch has not a power of two of leaves, or `world` is none."""
    if micro_batch is None:
        raise ValueError(
            "train.exact_sums=true adds up micro-batches of a size that stays; set train.micro_batch, whatever the "
            "number of processes"
        )
    leaves = global_batch // micro_batch
    if world & (world - 1) or leaves & (leaves - 1):
        raise ValueError(
            f"train.exact_sums=true needs a power of two of processes and of micro-batches, not {world} and "
            f"{leaves} (train.global_batch={global_batch} / train.micro_batch={micro_batch}); change one of them"
        )


def in_tree_order(each: Sequence[T]) -> list[T]:
    """The micro-batches of one process in the order in which neighbours, then pairs of neighbours ..., are added."""
    count = len(each)
    assert count & (count - 1) == 0
    order = [0]
    while len(order) < count:  # bit reversal
        order = [2 * n for n in order] + [2 * n + 1 for n in order]
    return [each[n] for n in order]


def fix_threads(device: torch.device) -> None:
    """As many threads as OMP_NUM_THREADS says, or one, in each process on a CPU: a kernel's sums depend on them."""
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))


class TreeSums:
    """The gradients of the leaves, added in the tree; in the end the masters' `.grad` on every process.

    A parameter that no leaf gave a gradient has a zero one.
    """

    def __init__(self, masters: Masters, processes: Processes) -> None:
        self.pairs = list(zip(masters.tensors, masters.trained, strict=True))
        self.masters, self.processes = masters, processes
        self.free: list[
            tuple[Tensor, list[Tensor]]
        ] = []  # buffers: flat, and as the parameters' parts
        self.sums: list[tuple[Tensor, list[Tensor]]] = []  # of finished subtrees, the largest first
        self.leaves = 0
        self.arriving: Tensor | None = None

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradients of the next leaf, in tree order, from the parameters."""
        buffer, parts = self.free.pop() if self.free else self._buffer()
        for (_, parameter), part in zip(self.pairs, parts, strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad)
                parameter.grad = None
        number, self.leaves = self.leaves, self.leaves + 1
        self.sums.append((buffer, parts))
        while number & 1:  # two subtrees of one size
            later = self.sums.pop()
            self.sums[-1][0].add_(later[0])
            self.free.append(later)
            number >>= 1

    @torch.no_grad()
    def finish(self) -> None:
        """The whole sum. Collective."""
        assert len(self.sums) == 1, "a power of two of leaves"
        (total,) = self.sums
        self._over_processes(total[0])
        for (master, _), part in zip(self.pairs, total[1], strict=True):
            master.grad = part
        self.free.append(total)
        self.sums, self.leaves = [], 0

    def local(self) -> Tensor:
        """The sum of this process's own leaves, before `finish`."""
        return self.sums[0][0]

    def forget(self) -> None:
        """As if no leaf of this step had been added."""
        self.free += self.sums
        self.sums, self.leaves = [], 0

    def _buffer(self) -> tuple[Tensor, list[Tensor]]:
        parts = flat.side_by_side(self.masters.tensors)
        (buffer,) = flat.joined(parts)
        return buffer, parts

    def _over_processes(self, total: Tensor) -> None:
        """Sum over the processes, in place: the highest bit of the rank first, as in the tree."""
        rank, bit = self.processes.rank, self.processes.world >> 1
        if not bit:
            return
        if self.arriving is None:
            self.arriving = torch.empty_like(total[: -(-total.numel() // 2)])
        low, high = 0, total.numel()
        halves: list[tuple[int, int, int]] = []
        while bit:  # each pair of processes halves between them what they have to add
            middle = (low + high) // 2
            mine, theirs = (low, middle), (middle, high)
            if rank & bit:
                mine, theirs = theirs, mine
            arriving = self.arriving[: mine[1] - mine[0]]
            _exchange(rank ^ bit, total[theirs[0] : theirs[1]], arriving)
            total[mine[0] : mine[1]].add_(arriving)
            halves.append((bit, *theirs))
            (low, high), bit = mine, bit >> 1
        for bit, start, end in reversed(halves):  # and collects
            _exchange(rank ^ bit, total[low:high], total[start:end])
            low, high = min(low, start), max(high, end)


def _exchange(partner: int, out: Tensor, into: Tensor) -> None:
    """Send `out` to a process and receive `into` from it; both know the lengths."""
    operations = [
        dist.P2POp(operation, tensor, partner)
        for operation, tensor in ((dist.isend, out), (dist.irecv, into))
        if tensor.numel()
    ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
