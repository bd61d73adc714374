"""The Triton kernels of group normalisation with SiLU; what launches them is in triton_gpu.py.

All take x as [samples, rows, channels], a row being a pixel. A program handles one block of channels of a run of rows,
tile by tile, so that any size of a group is served: sums are taken for each channel and merged into groups afterwards.

Shape legend: R rows and C channels of a tile, E elements of a vector.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.0 / math.log(2.0))
# Where exp(z) leaves the range of float32.
BOUND = tl.constexpr(87.0)


@triton.jit
def place(num_blocks, num_runs, COLUMNS: tl.constexpr):
    """This program's sample (64 bits wide), run of rows and first channel."""
    block = tl.program_id(0) % num_blocks
    item = tl.program_id(0) // num_blocks
    return (item // num_runs).to(tl.int64), item % num_runs, block * COLUMNS


@triton.jit
def load_tile(ptr, offset_RC, mask_RC):
    return tl.load(ptr + offset_RC, mask_RC, 0.0).to(tl.float32)


@triton.jit
def rows_mask(row, num_rows, ROWS: tl.constexpr):
    """Which of the rows from `row` on exist, [R, 1]."""
    return (row + tl.arange(0, ROWS) < num_rows)[:, None]


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_runs", "num_tiles"])
def statistics_kernel(
    x_ptr,
    partial_ptr,
    num_rows,
    num_channels,
    num_blocks,
    num_runs,
    num_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and sum of squared differences, of every channel over one run: float32 [samples, runs, 2, channels]."""
    sample, run, column = place(num_blocks, num_runs, COLUMNS)
    row_R, column_C = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask_C = column + column_C < num_channels
    offset_RC = row_R[:, None] * num_channels + column_C[None, :]
    first = run * (num_tiles * ROWS)
    x_ptr += (sample * num_rows + first) * num_channels + column
    # Welford's recurrence in every lane of the tile: each sees every ROWS-th row.
    mean_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    square_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    count = 0.0
    for tile in range(num_tiles):
        valid_R1 = rows_mask(first + tile * ROWS, num_rows, ROWS)
        x_RC = load_tile(x_ptr, offset_RC, valid_R1 & mask_C[None, :])
        count += 1.0
        delta_RC = tl.where(valid_R1, x_RC - mean_RC, 0.0)
        mean_RC += delta_RC * (1.0 / count)
        square_RC += delta_RC * (x_RC - mean_RC)
        x_ptr += ROWS * num_channels
    # Chan's formula over the lanes that saw a row. The first mean's rounding is taken out by a look at the differences.
    rows_R1 = (num_rows - first - row_R + (ROWS - 1)) // ROWS
    weight_R1 = tl.minimum(tl.maximum(rows_R1, 0), num_tiles).to(tl.float32)[:, None]
    total = tl.minimum(num_rows - first, num_tiles * ROWS).to(tl.float32)
    mean_C = tl.sum(weight_R1 * mean_RC, axis=0) / total
    delta_RC = tl.where(weight_R1 > 0.0, mean_RC - mean_C[None, :], 0.0)
    shift_C = tl.sum(weight_R1 * delta_RC, axis=0) / total
    delta_RC = tl.where(weight_R1 > 0.0, delta_RC - shift_C[None, :], 0.0)
    square_C = tl.sum(square_RC + weight_R1 * (delta_RC * delta_RC), axis=0)
    partial_ptr += (sample * num_runs + run) * 2 * num_channels + column
    tl.store(partial_ptr + column_C, mean_C + shift_C, mask_C)
    tl.store(partial_ptr + num_channels + column_C, square_C, mask_C)


@triton.jit
def part(first, num_parts, width, num_channels, BLOCK: tl.constexpr):
    """Vector of a group's partial results, numbered over runs and channels: (run, offset, mask)."""
    part_E = first + tl.arange(0, BLOCK)
    run_E = part_E // width
    return run_E, run_E.to(tl.int64) * 2 * num_channels + part_E % width, part_E < num_parts


@triton.jit
def store_pair(ptr, first_value, second_value, width, num_channels, BLOCK: tl.constexpr):
    """Two values for each of a group's channels."""
    for first in range(0, width, BLOCK):
        channel_E = first + tl.arange(0, BLOCK)
        ones_E = tl.full([BLOCK], 1.0, tl.float32)
        tl.store(ptr + channel_E, first_value * ones_E, channel_E < width)
        tl.store(ptr + num_channels + channel_E, second_value * ones_E, channel_E < width)


@triton.jit(do_not_specialize=["num_rows", "num_runs", "rows_per_run", "num_groups"])
def group_kernel(
    partial_ptr,
    statistics_ptr,
    num_rows,
    num_channels,
    num_groups,
    num_runs,
    rows_per_run,
    eps,
    BLOCK: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of one group from what statistics_kernel wrote, by Chan's formula.

    Written for each of its channels, float32 [samples, 2, channels]: nobody has to find a channel's group again.
    """
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    width = num_channels // num_groups
    num_parts = num_runs * width
    partial_ptr += sample * num_runs * 2 * num_channels + group * width
    total = num_rows.to(tl.float32) * width.to(tl.float32)
    sum_E = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_parts, BLOCK):
        run_E, at_E, mask_E = part(first, num_parts, width, num_channels, BLOCK)
        rows_E = tl.minimum(num_rows - run_E * rows_per_run, rows_per_run).to(tl.float32)
        sum_E += tl.where(mask_E, rows_E * tl.load(partial_ptr + at_E, mask_E, 0.0), 0.0)
    mean = tl.sum(sum_E, axis=0) / total
    shift_E = tl.zeros([BLOCK], tl.float32)
    square_E = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_parts, BLOCK):
        run_E, at_E, mask_E = part(first, num_parts, width, num_channels, BLOCK)
        rows_E = tl.minimum(num_rows - run_E * rows_per_run, rows_per_run).to(tl.float32)
        delta_E = tl.where(mask_E, tl.load(partial_ptr + at_E, mask_E, 0.0) - mean, 0.0)
        shift_E += rows_E * delta_E
        square_E += tl.load(partial_ptr + num_channels + at_E, mask_E, 0.0)
        square_E += rows_E * (delta_E * delta_E)
    shift = tl.sum(shift_E, axis=0) / total
    square = tl.sum(square_E, axis=0)
    # An infinite variance stays so.
    square -= tl.where(square == float("inf"), 0.0, total * (shift * shift))
    variance = tl.maximum(square, 0.0, tl.PropagateNan.ALL) / total
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    at = sample * 2 * num_channels + group * width
    store_pair(statistics_ptr + at, mean + shift, rstd, width, num_channels, BLOCK)


@triton.jit
def load_pair(ptr, sample, column, column_1C, mask_1C, num_channels):
    """A block's values of float32 [samples, 2, channels], each [1, C]."""
    ptr += sample * 2 * num_channels + column
    first_1C = tl.load(ptr + column_1C, mask_1C, 0.0)
    return first_1C, tl.load(ptr + num_channels + column_1C, mask_1C, 0.0)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_runs", "num_tiles"])
def apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    y_ptr,
    num_rows,
    num_channels,
    num_blocks,
    num_runs,
    num_tiles,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y of one run of rows."""
    sample, run, column = place(num_blocks, num_runs, COLUMNS)
    column_1C = tl.arange(0, COLUMNS)[None, :]
    mask_1C = column + column_1C < num_channels
    mean_1C, rstd_1C = load_pair(statistics_ptr, sample, column, column_1C, mask_1C, num_channels)
    weight_1C = load_tile(weight_ptr + column, column_1C, mask_1C)
    bias_1C = load_tile(bias_ptr + column, column_1C, mask_1C)
    weight_1C *= rstd_1C
    offset_RC = tl.arange(0, ROWS)[:, None] * num_channels + column_1C
    first = run * (num_tiles * ROWS)
    start = (sample * num_rows + first) * num_channels + column
    for tile in range(num_tiles):
        mask_RC = rows_mask(first + tile * ROWS, num_rows, ROWS) & mask_1C
        x_RC = load_tile(x_ptr + start, offset_RC, mask_RC)
        y_RC = (x_RC - mean_1C) * weight_1C + bias_1C
        if SILU:
            y_RC = y_RC / (1.0 + tl.exp2(y_RC * -LOG2_E))
        tl.store(y_ptr + start + offset_RC, y_RC.to(y_ptr.dtype.element_ty), mask_RC)
        start += ROWS * num_channels


@triton.jit
def d_z_tile(d_y_RC, x_hat_RC, weight_1C, bias_1C, SILU: tl.constexpr):
    """Gradient by the SiLU's argument."""
    if SILU:
        z_RC = x_hat_RC * weight_1C + bias_1C
        # Beyond the bound the slope is 0 or 1 to within 1e-35.
        z_RC = tl.clamp(z_RC, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL)
        e_RC = tl.exp2(z_RC * -LOG2_E)
        s_RC = 1.0 / (1.0 + e_RC)
        d_y_RC = d_y_RC * (s_RC + s_RC * (z_RC * (e_RC * s_RC)))
    return d_y_RC


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_runs", "num_tiles"])
def reduce_kernel(
    d_y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    partial_ptr,
    num_rows,
    num_channels,
    num_blocks,
    num_runs,
    num_tiles,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums of d_z and d_z x_hat, of every channel over one run: float32 [samples, runs, 2, channels]."""
    sample, run, column = place(num_blocks, num_runs, COLUMNS)
    column_C = tl.arange(0, COLUMNS)
    column_1C = column_C[None, :]
    mask_1C = column + column_1C < num_channels
    mean_1C, rstd_1C = load_pair(statistics_ptr, sample, column, column_1C, mask_1C, num_channels)
    weight_1C = load_tile(weight_ptr + column, column_1C, mask_1C)
    bias_1C = load_tile(bias_ptr + column, column_1C, mask_1C)
    offset_RC = tl.arange(0, ROWS)[:, None] * num_channels + column_1C
    first = run * (num_tiles * ROWS)
    start = (sample * num_rows + first) * num_channels + column
    d_z_sum_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    product_sum_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(num_tiles):
        mask_RC = rows_mask(first + tile * ROWS, num_rows, ROWS) & mask_1C
        d_y_RC = load_tile(d_y_ptr + start, offset_RC, mask_RC)
        x_hat_RC = (load_tile(x_ptr + start, offset_RC, mask_RC) - mean_1C) * rstd_1C
        d_z_RC = d_z_tile(d_y_RC, x_hat_RC, weight_1C, bias_1C, SILU)
        # Outside the mask d_y is zero, unless the statistics are not numbers.
        d_z_sum_RC += d_z_RC
        product_sum_RC += d_z_RC * x_hat_RC
        start += ROWS * num_channels
    partial_ptr += (sample * num_runs + run) * 2 * num_channels + column
    mask_C = column + column_C < num_channels
    tl.store(partial_ptr + column_C, tl.sum(d_z_sum_RC, axis=0), mask_C)
    tl.store(partial_ptr + num_channels + column_C, tl.sum(product_sum_RC, axis=0), mask_C)


@triton.jit(do_not_specialize=["num_runs", "num_groups"])
def group_means_kernel(
    partial_ptr,
    weight_ptr,
    means_ptr,
    num_channels,
    num_groups,
    num_runs,
    inverse_total,
    BLOCK: tl.constexpr,
):
    """Means of weight d_z and weight d_z x_hat over a group, for each channel: float32 [samples, 2, channels]."""
    sample = (tl.program_id(0) // num_groups).to(tl.int64)
    group = tl.program_id(0) % num_groups
    width = num_channels // num_groups
    num_parts = num_runs * width
    partial_ptr += sample * num_runs * 2 * num_channels + group * width
    d_z_E = tl.zeros([BLOCK], tl.float32)
    product_E = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_parts, BLOCK):
        _, at_E, mask_E = part(first, num_parts, width, num_channels, BLOCK)
        channel_E = group * width + (first + tl.arange(0, BLOCK)) % width
        weight_E = load_tile(weight_ptr, channel_E, mask_E)
        d_z_E += weight_E * tl.load(partial_ptr + at_E, mask_E, 0.0)
        product_E += weight_E * tl.load(partial_ptr + num_channels + at_E, mask_E, 0.0)
    d_z, product = tl.sum(d_z_E, axis=0) * inverse_total, tl.sum(product_E, axis=0) * inverse_total
    at = sample * 2 * num_channels + group * width
    store_pair(means_ptr + at, d_z, product, width, num_channels, BLOCK)


@triton.jit(do_not_specialize=["num_parts"])
def channel_sum_kernel(
    partial_ptr,
    d_weight_ptr,
    d_bias_ptr,
    num_parts,
    num_channels,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_weight and d_bias: sums over the runs of all samples, for one block of channels a program."""
    column_C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask_C = column_C < num_channels
    bias_RC = tl.zeros([PARTS, COLUMNS], tl.float32)
    weight_RC = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(0, num_parts, PARTS):
        part_R = first + tl.arange(0, PARTS)
        mask_RC = (part_R < num_parts)[:, None] & mask_C[None, :]
        at_RC = part_R.to(tl.int64)[:, None] * 2 * num_channels + column_C[None, :]
        bias_RC += tl.load(partial_ptr + at_RC, mask_RC, 0.0)
        weight_RC += tl.load(partial_ptr + num_channels + at_RC, mask_RC, 0.0)
    bias_C, weight_C = tl.sum(bias_RC, axis=0), tl.sum(weight_RC, axis=0)
    tl.store(d_bias_ptr + column_C, bias_C.to(d_bias_ptr.dtype.element_ty), mask_C)
    tl.store(d_weight_ptr + column_C, weight_C.to(d_weight_ptr.dtype.element_ty), mask_C)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_runs", "num_tiles"])
def apply_backward_kernel(
    d_y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    statistics_ptr,
    means_ptr,
    d_x_ptr,
    num_rows,
    num_channels,
    num_blocks,
    num_runs,
    num_tiles,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_x of one run of rows."""
    sample, run, column = place(num_blocks, num_runs, COLUMNS)
    column_1C = tl.arange(0, COLUMNS)[None, :]
    mask_1C = column + column_1C < num_channels
    mean_1C, rstd_1C = load_pair(statistics_ptr, sample, column, column_1C, mask_1C, num_channels)
    weight_1C = load_tile(weight_ptr + column, column_1C, mask_1C)
    bias_1C = load_tile(bias_ptr + column, column_1C, mask_1C)
    first_1C, second_1C = load_pair(means_ptr, sample, column, column_1C, mask_1C, num_channels)
    first_1C *= rstd_1C
    second_1C *= rstd_1C
    scale_1C = weight_1C * rstd_1C
    offset_RC = tl.arange(0, ROWS)[:, None] * num_channels + column_1C
    first = run * (num_tiles * ROWS)
    start = (sample * num_rows + first) * num_channels + column
    for tile in range(num_tiles):
        mask_RC = rows_mask(first + tile * ROWS, num_rows, ROWS) & mask_1C
        d_y_RC = load_tile(d_y_ptr + start, offset_RC, mask_RC)
        x_hat_RC = (load_tile(x_ptr + start, offset_RC, mask_RC) - mean_1C) * rstd_1C
        d_z_RC = d_z_tile(d_y_RC, x_hat_RC, weight_1C, bias_1C, SILU)
        d_x_RC = scale_1C * d_z_RC - first_1C - second_1C * x_hat_RC
        tl.store(d_x_ptr + start + offset_RC, d_x_RC.to(d_x_ptr.dtype.element_ty), mask_RC)
        start += ROWS * num_channels
