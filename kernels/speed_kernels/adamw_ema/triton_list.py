"""AdamW + EMA, and the sum of squares, over a list of tensors in one launch: their addresses are a table on the device.

A kernel that is first used while a CUDA graph is captured would be loaded there, which the driver forbids. So a capture
launches the very kernels of eager steps. It records no upload either: the table lies in the graph's memory and is
written by `fill`, between the capture and the first replay.
"""

# B blocks, P partial sums, L tensors of a list.

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from speed_kernels import launch
from speed_kernels.adamw_ema.triton_flat import (
    BLOCK,
    MAX_PARTIALS,
    NUM_WARPS,
    square_total_kernel,
    update_block,
)


@triton.jit
def _address(table_ptr, type_ptr, ALIGNED: tl.constexpr):
    """The address at `table_ptr`, as a pointer of the type of `type_ptr`."""
    address = tl.load(table_ptr).to(type_ptr.dtype)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _tensor_of(table_ptr, block, L):
    """The tensor of a block: the last one that begins, as the table's first row tells, at it or before."""
    low, high = block * 0, block * 0 + L  # the tensor is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["L"])
def update_list_kernel(
    table_ptr,
    float_ptr,
    grad_ptr,
    copy_ptr,
    scalars_ptr,
    L,
    SECOND: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor per program. The table [9, L] holds the first block of each tensor, its size, and the
    addresses of g, p, m, v, e1, e2 and copy; float_ptr, grad_ptr and copy_ptr only tell types."""
    if tl.load(scalars_ptr) == 0.0:
        return
    block = tl.program_id(0).to(tl.int64)
    row = table_ptr + _tensor_of(table_ptr, block, L)
    start = (block - tl.load(row)) * BLOCK
    g_ptr = _address(row + 2 * L, grad_ptr, ALIGNED) + start
    p_ptr = _address(row + 3 * L, float_ptr, ALIGNED) + start
    m_ptr = _address(row + 4 * L, float_ptr, ALIGNED) + start
    v_ptr = _address(row + 5 * L, float_ptr, ALIGNED) + start
    e1_ptr = _address(row + 6 * L, float_ptr, ALIGNED) + start
    e2_ptr = _address(row + 7 * L, float_ptr, ALIGNED) + start
    c_ptr = _address(row + 8 * L, copy_ptr, ALIGNED) + start
    update_block(
        p_ptr, g_ptr, m_ptr, v_ptr, e1_ptr, e2_ptr, c_ptr, scalars_ptr, tl.load(row + L) - start,
        SECOND, COPY, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["L", "num_blocks"])
def square_list_kernel(
    table_ptr,
    grad_ptr,
    partial_ptr,
    L,
    num_blocks,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[program] = sum of squares of one run of consecutive blocks, in float64. The table [3, L] is the beginning
    of that of `update_list_kernel`; grad_ptr only tells a type. Sizes alone decide the order of addition."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    block, end = program * num_blocks // programs, (program + 1) * num_blocks // programs
    tensor = _tensor_of(table_ptr, block, L)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    while block < end:
        row = table_ptr + tensor
        start, size = (block - tl.load(row)) * BLOCK, tl.load(row + L)
        g_ptr = _address(row + 2 * L, grad_ptr, ALIGNED)
        stop = tl.minimum(size, start + (end - block) * BLOCK)
        block += (stop - start + BLOCK - 1) // BLOCK
        while start + BLOCK <= stop:  # a whole block needs no mask that would forbid wide accesses
            g = tl.load(g_ptr + start + lanes).to(tl.float32)
            total += g * g
            start += BLOCK
        if start < stop:
            g = tl.load(g_ptr + start + lanes, mask=start + lanes < stop, other=0.0).to(tl.float32)
            total += g * g
        tensor += 1
    tl.store(partial_ptr + program, tl.sum(total.to(tl.float64), axis=0))


class Table:
    """int64 [rows, L] in device memory: the first block of each tensor, its size, addresses of gradients, then `fixed`.

    Gradients may lie elsewhere in every step; the table is sent only when they do, and nothing waits for that.
    """

    def __init__(self, params: Sequence[Tensor], fixed: Sequence[Sequence[Tensor]]) -> None:
        sizes = [param.numel() for param in params]
        first = list(itertools.accumulate((-(-size // BLOCK) for size in sizes), initial=0))
        self.num_blocks = first.pop()
        self.device = params[0].device
        self.length = len(sizes)
        self.head, self.tail = array("q", first + sizes), array("q")
        for tensors in fixed:
            none = [0] * self.length
            self.tail.extend([tensor.data_ptr() for tensor in tensors] if tensors else none)
        self.fixed_aligned = _aligned(self.tail)
        self.known: list[int] = []  # gradients' addresses in `sent`
        self.sent: tuple[Tensor, bool] | None = None
        self.recorded: list[tuple[Tensor, Tensor]] = []  # tables of graphs, and what goes there

    def at(self, grads: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """(the table, whether all addresses are multiples of 16) for these gradients."""
        addresses = [grad.data_ptr() for grad in grads]
        capturing = launch.capturing(self.device)
        if self.sent is not None and not capturing and addresses == self.known:
            return self.sent
        numbers = torch.frombuffer(self.head + array("q", addresses) + self.tail, dtype=torch.int64)
        aligned = self.fixed_aligned and _aligned(addresses)
        if capturing:
            table = torch.empty(numbers.shape, dtype=torch.int64, device=self.device)
            self.recorded.append((table, numbers))
            return table, aligned
        self.known = addresses
        self.sent = numbers.to(self.device, non_blocking=True), aligned
        return self.sent

    def fill(self) -> list[Tensor]:
        """Write the tables of graphs that were captured, and return them: the graphs read them for ever."""
        filled = [table.copy_(numbers, non_blocking=True) for table, numbers in self.recorded]
        self.recorded = []
        return filled


def _aligned(addresses: Iterable[int]) -> bool:
    return all(address % 16 == 0 for address in addresses)


class ListUpdate:
    """`op.adamw_ema` of many tensors that stay where they are, but for the gradients."""

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        emas: Sequence[Tensor],
        second_emas: Sequence[Tensor],
        copies: Sequence[Tensor],
    ) -> None:
        fixed = (params, exp_avgs, exp_avg_sqs, emas, second_emas, copies)
        self.table = Table(params, fixed)
        self.tensors = fixed  # the addresses are theirs
        self.float = params[0]
        self.copy = copies[0] if copies else params[0]
        self.second, self.copied = bool(second_emas), bool(copies)

    def __call__(self, grads: Sequence[Tensor], scalars: Tensor) -> None:
        if self.table.num_blocks == 0:
            return
        table, aligned = self.table.at(grads)
        with torch.cuda.device_of(scalars):
            update_list_kernel[(self.table.num_blocks,)](
                table,
                self.float,
                grads[0],
                self.copy,
                scalars,
                self.table.length,
                SECOND=self.second,
                COPY=self.copied,
                ALIGNED=aligned,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )

    def fill(self) -> list[Tensor]:
        """See `Table.fill`."""
        return self.table.fill()


class ListSquares:
    """`op.grad_square_sum` of gradients whose sizes stay the same."""

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self.table = Table(grads, ())

    def __call__(self, grads: Sequence[Tensor]) -> Tensor:
        device, num_blocks = self.table.device, self.table.num_blocks
        num_partials = min(num_blocks, MAX_PARTIALS)
        partials_P = torch.empty(num_partials, dtype=torch.float64, device=device)
        total = torch.empty((), dtype=torch.float32, device=device)
        with torch.cuda.device_of(total):
            if num_partials:
                table, aligned = self.table.at(grads)
                square_list_kernel[(num_partials,)](
                    table,
                    grads[0],
                    partials_P,
                    self.table.length,
                    num_blocks,
                    ALIGNED=aligned,
                    BLOCK=BLOCK,
                    num_warps=NUM_WARPS,
                )
            square_total_kernel[(1,)](
                partials_P, total, num_partials, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
        return total

    def fill(self) -> list[Tensor]:
        """See `Table.fill`."""
        return self.table.fill()
