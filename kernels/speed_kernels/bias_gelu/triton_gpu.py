"""Bias and GELU in Triton on CUDA GPUs (A100, H100, H200, B200).

A program handles a tile of some rows by up to 512 columns, so that it reads its part of the bias once. The widths of
transformers (1536, 3072, 4096, 4608) are multiples of 512 and move 128 bits per thread and access. In the backward pass
a program walks down a run of rows and keeps its column sums, which a second, small launch adds up. How rows are cut
depends on the shape alone: the sums are equal on all GPUs.

Shape legend: R rows and C columns of a tile, G runs of rows in the second sum, D columns of x.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from speed_kernels import launch

FORWARD_TILE, BACKWARD_TILE = (
    2048,
    1024,
)  # elements that a program handles at a time: 16 or 8 per thread
MAX_COLUMNS = 512
NUM_WARPS = 4
PROGRAMS = (
    2048  # of a backward launch at most, so that their sums stay small: about two waves on an H200
)
MIN_TILES = 8  # that a program of the backward pass takes in turn
SUM_RUNS, SUM_COLUMNS = 64, 32  # tile of the second sum

_TWICE_K = 2.0 * math.sqrt(2.0 / math.pi)
TWICE_K = tl.constexpr(_TWICE_K)
TWICE_3KC = tl.constexpr(_TWICE_K * 3.0 * 0.044715)
# The argument of the sigmoid comes in units of ln 2: the processor's own exponential is that of base 2.
Q1 = tl.constexpr(_TWICE_K / math.log(2.0))
Q3 = tl.constexpr(_TWICE_K * 0.044715 / math.log(2.0))
# Where 2^q leaves the range of float32.
BOUND = tl.constexpr(10.0)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return launch.unavailable()


@triton.jit
def exp_minus_q(u):
    """exp(-q(u)): infinity far below zero, and then sigmoid(q) = 1 / (1 + exp(-q)) is zero."""
    return tl.exp2(-(u * (Q1 + Q3 * (u * u))))


@triton.jit
def load_tile(ptr, offset_RC, mask_RC):
    return tl.load(ptr + offset_RC, mask_RC, 0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, offset_RC, value_RC, mask_RC):
    tl.store(ptr + offset_RC, value_RC.to(ptr.dtype.element_ty), mask_RC)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_columns,
    num_blocks,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program row * num_blocks + column: one tile."""
    row = (tl.program_id(0) // num_blocks).to(tl.int64) * ROWS
    column = (tl.program_id(0) % num_blocks) * COLUMNS
    row_R, column_C = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask_C = column + column_C < num_columns
    mask_RC = (row + row_R < num_rows)[:, None] & mask_C[None, :]
    offset_RC = row_R[:, None] * num_columns + column_C[None, :]
    start = row * num_columns + column
    u_RC = load_tile(x_ptr + start, offset_RC, mask_RC)
    if BIAS:
        u_RC += load_tile(bias_ptr + column, column_C[None, :], mask_C[None, :])
    s_RC = 1.0 / (1.0 + exp_minus_q(u_RC))
    store_tile(y_ptr + start, offset_RC, u_RC * s_RC, mask_RC)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_tiles"])
def backward_kernel(
    d_y_ptr,
    x_ptr,
    bias_ptr,
    d_x_ptr,
    partial_ptr,
    num_rows,
    num_columns,
    num_blocks,
    num_tiles,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program run * num_blocks + column: `num_tiles` tiles of one block of columns, and their sums."""
    run = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = (tl.program_id(0) % num_blocks) * COLUMNS
    row_R, column_C = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask_C = column + column_C < num_columns
    offset_RC = row_R[:, None] * num_columns + column_C[None, :]
    bias_1C = tl.zeros([1, COLUMNS], tl.float32)
    if BIAS:
        bias_1C = load_tile(bias_ptr + column, column_C[None, :], mask_C[None, :])
    sum_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(num_tiles):
        row = (run * num_tiles + tile) * ROWS
        mask_RC = (row + row_R < num_rows)[:, None] & mask_C[None, :]
        start = row * num_columns + column
        d_y_RC = load_tile(d_y_ptr + start, offset_RC, mask_RC)
        u_RC = load_tile(x_ptr + start, offset_RC, mask_RC) + bias_1C
        # Beyond the bound the slope is 0 or 1 to within 1e-35, and powers of u may be infinite.
        v_RC = tl.clamp(u_RC, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL)
        e_RC = exp_minus_q(v_RC)
        s_RC = 1.0 / (1.0 + e_RC)
        bend_RC = v_RC * (TWICE_K + TWICE_3KC * (v_RC * v_RC)) * (e_RC * s_RC)
        d_x_RC = d_y_RC * (s_RC + s_RC * bend_RC)
        store_tile(d_x_ptr + start, offset_RC, d_x_RC, mask_RC)
        if BIAS:
            sum_RC += d_x_RC  # outside the mask d_y is zero
    if BIAS:
        tl.store(
            partial_ptr + run * num_columns + column + column_C, tl.sum(sum_RC, axis=0), mask_C
        )


@triton.jit(do_not_specialize=["num_runs"])
def column_sum_kernel(
    partial_ptr, sum_ptr, num_runs, num_columns, RUNS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums over the runs of float32 [num_runs, num_columns], for one block of columns a program."""
    column_C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask_C = column_C < num_columns
    sum_GC = tl.zeros([RUNS, COLUMNS], tl.float32)
    for first in range(0, num_runs, RUNS):
        run_G = first + tl.arange(0, RUNS)
        mask_GC = (run_G < num_runs)[:, None] & mask_C[None, :]
        offset_GC = run_G.to(tl.int64)[:, None] * num_columns + column_C[None, :]
        sum_GC += tl.load(partial_ptr + offset_GC, mask_GC, 0.0)
    tl.store(sum_ptr + column_C, tl.sum(sum_GC, axis=0).to(sum_ptr.dtype.element_ty), mask_C)


def tile_shape(tile: int, num_columns: int) -> tuple[int, int]:
    """Rows and columns of a tile of `tile` elements."""
    columns = min(MAX_COLUMNS, max(16, (1 << (num_columns - 1).bit_length())))
    return tile // columns, columns


def tiles_per_run(num_row_tiles: int, num_blocks: int) -> int:
    """How many tiles a program of the backward pass takes in turn."""
    return max(MIN_TILES, -(-num_row_tiles * num_blocks // PROGRAMS))


def bias_gelu(x: Tensor, bias_D: Tensor | None) -> Tensor:
    """See `speed_kernels.bias_gelu.op`. One launch."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    num_columns = x.shape[-1]
    num_rows = x.numel() // num_columns
    rows, columns = tile_shape(FORWARD_TILE, num_columns)
    num_blocks = -(-num_columns // columns)
    with torch.cuda.device_of(x):
        forward_kernel[(-(-num_rows // rows) * num_blocks,)](
            x,
            x if bias_D is None else bias_D.contiguous(),
            y,
            num_rows,
            num_columns,
            num_blocks,
            BIAS=bias_D is not None,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=NUM_WARPS,
        )
        launch.settled(forward_kernel)
    return y


def bias_gelu_backward(d_y: Tensor, x: Tensor, bias_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `speed_kernels.bias_gelu.reference`. One launch, and a small one if there is a bias."""
    d_y, x = d_y.contiguous(), x.contiguous()
    d_x = torch.empty_like(x)
    d_bias_D = x.new_empty(0 if bias_D is None else x.shape[-1])
    if x.numel() == 0:
        return d_x, d_bias_D.zero_()
    num_columns = x.shape[-1]
    num_rows = x.numel() // num_columns
    rows, columns = tile_shape(BACKWARD_TILE, num_columns)
    num_blocks = -(-num_columns // columns)
    num_row_tiles = -(-num_rows // rows)
    num_tiles = tiles_per_run(num_row_tiles, num_blocks)
    num_runs = -(-num_row_tiles // num_tiles)
    has_bias = bias_D is not None
    partial = torch.empty(
        num_runs * num_columns if has_bias else 0, dtype=torch.float32, device=x.device
    )
    with torch.cuda.device_of(x):
        backward_kernel[(num_runs * num_blocks,)](
            d_y,
            x,
            bias_D.contiguous() if has_bias else x,
            d_x,
            partial,
            num_rows,
            num_columns,
            num_blocks,
            num_tiles,
            BIAS=has_bias,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=NUM_WARPS,
        )
        if has_bias:
            column_sum_kernel[(-(-num_columns // SUM_COLUMNS),)](
                partial,
                d_bias_D,
                num_runs,
                num_columns,
                RUNS=SUM_RUNS,
                COLUMNS=SUM_COLUMNS,
                num_warps=NUM_WARPS,
            )
        launch.settled(backward_kernel)
    return d_x, d_bias_D
