"""The forward kernel for CUDA GPUs: a warp holds a row in its registers and reads it once.

A program takes one row per warp, all of one sample. No warp waits for another: statistics are sums within a warp.

Shape legend: K runs, R rows, C channels of a run, L lanes of a row (`triton_rows`).
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from speed_kernels import e4m3
from speed_kernels.gate_residual_norm_modulate.triton_rows import (
    ROWS_FIRST,
    channels,
    laned,
    load_piece,
    load_sample,
    per_lane,
    per_row,
    store_piece,
)

# The squares of distances beyond about 1e18 overflow; those of SHRINK of them do not.
SHRINK = tl.constexpr(2.0**-80)
SMALLEST_SCALE = tl.constexpr(e4m3.SMALLEST_SCALE)


@triton.jit
def residual_sum(
    x_ptr, branch_ptr, gate_ptr, bias_ptr, sum_ptr, offset_R, mask_R, GATED: tl.constexpr, BIASED: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A piece of the stream to norm, as float32: x, or the sum, which is stored and rounded."""
    x_KRC = load_piece(x_ptr, offset_R, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    stream_KRC = x_KRC.to(tl.float32)
    if GATED:
        branch_KRC = load_piece(branch_ptr, offset_R, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
        branch_KRC = branch_KRC.to(tl.float32)
        if BIASED:
            branch_KRC += load_sample(bias_ptr, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
        stream_KRC += load_sample(gate_ptr, mask_R, FIRST, WIDTH, RUN, VECTOR, D) * branch_KRC
        rounded_KRC = stream_KRC.to(x_KRC.dtype)
        store_piece(sum_ptr, rounded_KRC, offset_R, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
        stream_KRC = rounded_KRC.to(tl.float32)
    return stream_KRC


@triton.jit
def centred(
    stream_KRC, mean_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The piece less the mean, zero past the last channel."""
    distance_KRC = stream_KRC - per_row(mean_R)
    if FIRST + WIDTH > D:
        distance_KRC = tl.where(channels(FIRST, WIDTH, RUN, VECTOR) < D, distance_KRC, 0.0)
    return distance_KRC


@triton.jit
def moments(distance_KRC, LANES: tl.constexpr):
    """[R, L]: sums of distances, of their squares, and of the squares of SHRINK of them."""
    shrunk_KRC = distance_KRC * SHRINK
    squares_RL = per_lane(distance_KRC * distance_KRC, LANES)
    return per_lane(distance_KRC, LANES), squares_RL, per_lane(shrunk_KRC * shrunk_KRC, LANES)


@triton.jit
def add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def modulate(
    y_ptr, shift_ptr, scale_ptr, distance_KRC, error_R, rstd_R, offset_R, mask_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    normed_KRC = (distance_KRC - per_row(error_R)) * per_row(rstd_R)
    scale_KRC = load_sample(scale_ptr, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    shift_KRC = load_sample(shift_ptr, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    y_KRC = (normed_KRC * (1.0 + scale_KRC) + shift_KRC).to(y_ptr.dtype.element_ty)
    store_piece(y_ptr, y_KRC, offset_R, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    if FIRST + WIDTH > D:  # there the error of the mean is left
        y_KRC = tl.where(channels(FIRST, WIDTH, RUN, VECTOR) < D, y_KRC, 0.0)
    return y_KRC


@triton.jit
def larger(a, b):
    """What is not a number is larger than all that is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitude(y_KRC, LANES: tl.constexpr):
    """[R, L]: the largest magnitude of what a thread holds of a row."""
    y_KRLV = tl.abs(laned(y_KRC.to(tl.float32), LANES))
    return tl.reduce(tl.reduce(y_KRLV, 3, larger), 1 if ROWS_FIRST else 0, larger)


@triton.jit(do_not_specialize=["num_tokens", "num_chunks"])
def forward_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    bias_ptr,
    shift_ptr,
    scale_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    e4m3_ptr,
    row_scale_ptr,
    gate_stride,
    shift_stride,
    scale_stride,
    num_tokens,
    num_chunks,
    eps,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    RUN: tl.constexpr,
    REST: tl.constexpr,
    REST_RUN: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    """Program b * num_chunks + chunk: ROWS tokens of sample b."""
    b = (tl.program_id(0) // num_chunks).to(tl.int64)
    token_R = tl.program_id(0) % num_chunks * ROWS + tl.arange(0, ROWS)
    mask_R = token_R < num_tokens
    row_R = b * num_tokens + token_R
    offset_R = row_R * D
    if GATED:
        gate_ptr += b * gate_stride
    shift_ptr += b * shift_stride
    scale_ptr += b * scale_stride

    main_KRC = residual_sum(
        x_ptr, branch_ptr, gate_ptr, bias_ptr, sum_ptr, offset_R, mask_R, GATED, BIASED, 0, MAIN, RUN, VECTOR, D
    )  # fmt: skip
    # Times a power of two, so that no sum of finite numbers overflows.
    sum_RL = per_lane(main_KRC * (0.5 / MAIN), LANES)
    if REST > 0:
        rest_KRC = residual_sum(
            x_ptr, branch_ptr, gate_ptr, bias_ptr, sum_ptr, offset_R, mask_R, GATED, BIASED,
            MAIN, REST, REST_RUN, VECTOR, D,
        )  # fmt: skip
        sum_RL += per_lane(rest_KRC * (0.5 / MAIN), LANES)
    mean_R = tl.sum(sum_RL, axis=1) * (2.0 * MAIN / D)

    main_KRC = centred(main_KRC, mean_R, 0, MAIN, RUN, VECTOR, D)
    error_RL, square_RL, shrunk_RL = moments(main_KRC, LANES)
    if REST > 0:
        rest_KRC = centred(rest_KRC, mean_R, MAIN, REST, REST_RUN, VECTOR, D)
        more_RL, more_square_RL, more_shrunk_RL = moments(rest_KRC, LANES)
        error_RL += more_RL
        square_RL += more_square_RL
        shrunk_RL += more_shrunk_RL
    error_R, square_R, shrunk_R = tl.reduce((error_RL, square_RL, shrunk_RL), 1, add_three)
    # What rounding left out of the mean: a row of equal numbers has variance zero, and is normed to zero.
    error_R = error_R * (1.0 / D)
    shrunk_error_R = error_R * SHRINK
    overflow_R = square_R == float("inf")
    var_R = square_R * (1.0 / D) - error_R * error_R
    var_R = tl.where(overflow_R, shrunk_R * (1.0 / D) - shrunk_error_R * shrunk_error_R, var_R)
    var_R = tl.where(var_R < 0.0, 0.0, var_R)
    # Beside squares that overflow eps is nothing, unless they are only those of what rounding left out.
    rstd_R = tl.rsqrt(tl.where(overflow_R, var_R, var_R + eps)) * tl.where(overflow_R, SHRINK, 1.0)
    largest = tl.rsqrt(eps)
    rstd_R = tl.where(rstd_R > largest, largest, rstd_R)
    tl.store(mean_ptr + row_R, mean_R + error_R, mask=mask_R)
    tl.store(rstd_ptr + row_R, rstd_R, mask=mask_R)

    main_KRC = modulate(
        y_ptr, shift_ptr, scale_ptr, main_KRC, error_R, rstd_R, offset_R, mask_R, 0, MAIN, RUN, VECTOR, D
    )  # fmt: skip
    if REST > 0:
        rest_KRC = modulate(
            y_ptr, shift_ptr, scale_ptr, rest_KRC, error_R, rstd_R, offset_R, mask_R, MAIN, REST, REST_RUN, VECTOR, D
        )  # fmt: skip
    if QUANTISED:  # as speed_kernels/e4m3.py does, with its roundings: no approximate division
        largest_RL = magnitude(main_KRC, LANES)
        if REST > 0:
            largest_RL = larger(largest_RL, magnitude(rest_KRC, LANES))
        row_scale_R = larger(tl.div_rn(tl.reduce(largest_RL, 1, larger), 448.0), SMALLEST_SCALE)
        tl.store(row_scale_ptr + row_R, row_scale_R, mask=mask_R)
        inverse_R = tl.div_rn(1.0, row_scale_R)
        main_KRC = main_KRC.to(tl.float32) * per_row(inverse_R)
        store_piece(e4m3_ptr, main_KRC, offset_R, mask_R, 0, MAIN, RUN, VECTOR, D)
        if REST > 0:
            rest_KRC = rest_KRC.to(tl.float32) * per_row(inverse_R)
            store_piece(e4m3_ptr, rest_KRC, offset_R, mask_R, MAIN, REST, REST_RUN, VECTOR, D)
