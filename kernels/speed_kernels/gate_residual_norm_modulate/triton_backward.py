"""The backward kernels for CUDA GPUs: one pass over the data, then a small sum of partial sums.

A program of the first kernel walks down a run of one sample's rows, a few at a time, while the next ones are copied to
shared memory. Its threads keep the sums over tokens of their own channels in registers and write them once, as row
(b, chunk) of `partial` [B, chunks, NUM_SUMS, D] float32. The second kernel adds the chunks, and for the bias the
samples, in a fixed order.

Shape legend: K runs, R rows, C channels of a run, L lanes of a row (`triton_rows`); Q lines of `partial` of one
sample, P of all samples, W channels of a block.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from speed_kernels.gate_residual_norm_modulate.triton_rows import (
    channels,
    load_piece,
    load_sample,
    over_rows,
    per_lane,
    per_row,
    store_piece,
    zeros,
)

# Rows of `partial`: the sums of d_y, of d_y n, of branch d_x and of d_x.
SHIFT = tl.constexpr(0)
SCALE = tl.constexpr(1)
GATE = tl.constexpr(2)
D_X = tl.constexpr(3)


@triton.jit
def load_rows(
    d_sum_ptr, d_y_ptr, stream_ptr, branch_ptr, offset_R, mask_R, HAS_D_SUM: tl.constexpr, GATED: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A piece of d_y, of the stream, of d_sum and of the branch; the first again for what there is not."""
    d_y_KRC = load_piece(d_y_ptr, offset_R, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    stream_KRC = load_piece(stream_ptr, offset_R, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    d_sum_KRC = d_y_KRC
    branch_KRC = d_y_KRC
    if HAS_D_SUM:
        d_sum_KRC = load_piece(d_sum_ptr, offset_R, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    if GATED:
        branch_KRC = load_piece(branch_ptr, offset_R, mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    return d_y_KRC, stream_KRC, d_sum_KRC, branch_KRC


@triton.jit
def norm(
    stream_KRC, mean_R, rstd_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A piece of n; zero past the last channel, where a large mean times rstd could overflow."""
    normed_KRC = (stream_KRC.to(tl.float32) - per_row(mean_R)) * per_row(rstd_R)
    if FIRST + WIDTH > D:
        normed_KRC = tl.where(channels(FIRST, WIDTH, RUN, VECTOR) < D, normed_KRC, 0.0)
    return normed_KRC


@triton.jit
def through_norm(
    d_sum_KRC, d_y_KRC, normed_KRC, scale_KRC, mean_g_R, mean_gn_R, rstd_R, HAS_D_SUM: tl.constexpr
):
    """d_x of a piece."""
    g_KRC = d_y_KRC * scale_KRC
    inner_KRC = g_KRC - per_row(mean_g_R) - normed_KRC * per_row(mean_gn_R)
    d_x_KRC = per_row(rstd_R) * inner_KRC
    if HAS_D_SUM:
        d_x_KRC += d_sum_KRC.to(tl.float32)
    return d_x_KRC


@triton.jit
def store_sums(
    ptr, shift_KRC, scale_KRC, gate_KRC, d_x_KRC, NUM_SUMS: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Adds the rows' sums of a piece and writes them."""
    channel_KC = FIRST + (tl.arange(0, WIDTH // RUN) * RUN)[:, None] + tl.arange(0, RUN)[None, :]
    mask_KC = channel_KC < D
    tl.store(ptr + SHIFT * D + channel_KC, over_rows(shift_KRC), mask=mask_KC)
    tl.store(ptr + SCALE * D + channel_KC, over_rows(scale_KRC), mask=mask_KC)
    if NUM_SUMS > GATE:
        tl.store(ptr + GATE * D + channel_KC, over_rows(gate_KRC), mask=mask_KC)
    if NUM_SUMS > D_X:
        tl.store(ptr + D_X * D + channel_KC, over_rows(d_x_KRC), mask=mask_KC)


@triton.jit
def add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit(do_not_specialize=["num_tokens", "num_chunks", "chunk_rows"])
def backward_kernel(
    d_sum_ptr,
    d_y_ptr,
    stream_ptr,
    mean_ptr,
    rstd_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    d_x_ptr,
    d_branch_ptr,
    partial_ptr,
    gate_stride,
    scale_stride,
    num_tokens,
    num_chunks,
    chunk_rows,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    RUN: tl.constexpr,
    REST: tl.constexpr,
    REST_RUN: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_D_SUM: tl.constexpr,
):
    """Program b * num_chunks + chunk: `chunk_rows` tokens of sample b, ROWS at a time."""
    GATED: tl.constexpr = NUM_SUMS > 2
    BIASED: tl.constexpr = NUM_SUMS > 3
    b = (tl.program_id(0) // num_chunks).to(tl.int64)
    first = tl.program_id(0) % num_chunks * chunk_rows
    num_rows = tl.minimum(chunk_rows, num_tokens - first)
    # 64 bits here; within a chunk 32 bits suffice.
    first_row = b * num_tokens + first
    mean_ptr += first_row
    rstd_ptr += first_row
    start = first_row * D
    d_y_ptr += start
    stream_ptr += start
    d_x_ptr += start
    if HAS_D_SUM:
        d_sum_ptr += start
    if GATED:
        branch_ptr += start
        d_branch_ptr += start
        gate_ptr += b * gate_stride
    scale_ptr += b * scale_stride

    always_R = tl.arange(0, ROWS) >= 0
    main_scale_KRC = 1.0 + load_sample(scale_ptr, always_R, 0, MAIN, RUN, VECTOR, D)
    if GATED:
        main_gate_KRC = load_sample(gate_ptr, always_R, 0, MAIN, RUN, VECTOR, D)
    zeros_KRC = zeros(MAIN, RUN, ROWS)
    main_shift_sum, main_scale_sum, main_gate_sum, main_d_x_sum = (
        zeros_KRC, zeros_KRC, zeros_KRC, zeros_KRC,
    )  # fmt: skip
    if REST > 0:
        rest_scale_KRC = 1.0 + load_sample(scale_ptr, always_R, MAIN, REST, REST_RUN, VECTOR, D)
        if GATED:
            rest_gate_KRC = load_sample(gate_ptr, always_R, MAIN, REST, REST_RUN, VECTOR, D)
        zeros_KRC = zeros(REST, REST_RUN, ROWS)
        rest_shift_sum, rest_scale_sum, rest_gate_sum, rest_d_x_sum = (
            zeros_KRC, zeros_KRC, zeros_KRC, zeros_KRC,
        )  # fmt: skip

    for turn in tl.range(0, num_rows, ROWS, num_stages=NUM_STAGES):
        row_R = turn + tl.arange(0, ROWS)
        mask_R = row_R < num_rows
        mean_R = tl.load(mean_ptr + row_R, mask=mask_R, other=0.0)
        rstd_R = tl.load(rstd_ptr + row_R, mask=mask_R, other=0.0)
        main_d_y, main_stream, main_d_sum, main_branch = load_rows(
            d_sum_ptr, d_y_ptr, stream_ptr, branch_ptr, row_R * D, mask_R, HAS_D_SUM, GATED,
            0, MAIN, RUN, VECTOR, D,
        )  # fmt: skip
        if REST > 0:
            rest_d_y, rest_stream, rest_d_sum, rest_branch = load_rows(
                d_sum_ptr, d_y_ptr, stream_ptr, branch_ptr, row_R * D, mask_R, HAS_D_SUM, GATED,
                MAIN, REST, REST_RUN, VECTOR, D,
            )  # fmt: skip

        d_y_KRC = main_d_y.to(tl.float32)
        normed_KRC = norm(main_stream, mean_R, rstd_R, 0, MAIN, RUN, VECTOR, D)
        main_shift_sum += d_y_KRC
        main_scale_sum += d_y_KRC * normed_KRC
        g_KRC = d_y_KRC * main_scale_KRC
        g_RL = per_lane(g_KRC, LANES)
        gn_RL = per_lane(g_KRC * normed_KRC, LANES)
        if REST > 0:
            rest_d_y_KRC = rest_d_y.to(tl.float32)
            rest_normed_KRC = norm(rest_stream, mean_R, rstd_R, MAIN, REST, REST_RUN, VECTOR, D)
            rest_shift_sum += rest_d_y_KRC
            rest_scale_sum += rest_d_y_KRC * rest_normed_KRC
            g_KRC = rest_d_y_KRC * rest_scale_KRC
            g_RL += per_lane(g_KRC, LANES)
            gn_RL += per_lane(g_KRC * rest_normed_KRC, LANES)
        mean_g_R, mean_gn_R = tl.reduce((g_RL, gn_RL), 1, add_two)
        mean_g_R = mean_g_R * (1.0 / D)
        mean_gn_R = mean_gn_R * (1.0 / D)

        d_x_KRC = through_norm(
            main_d_sum, d_y_KRC, normed_KRC, main_scale_KRC, mean_g_R, mean_gn_R, rstd_R, HAS_D_SUM
        )
        store_piece(d_x_ptr, d_x_KRC, row_R * D, mask_R, 0, MAIN, RUN, VECTOR, D)
        if GATED:
            main_gate_sum += main_branch.to(tl.float32) * d_x_KRC
            d_branch_KRC = main_gate_KRC * d_x_KRC
            store_piece(d_branch_ptr, d_branch_KRC, row_R * D, mask_R, 0, MAIN, RUN, VECTOR, D)
        if BIASED:
            main_d_x_sum += d_x_KRC
        if REST > 0:
            d_x_KRC = through_norm(
                rest_d_sum, rest_d_y_KRC, rest_normed_KRC, rest_scale_KRC, mean_g_R, mean_gn_R, rstd_R, HAS_D_SUM
            )  # fmt: skip
            store_piece(d_x_ptr, d_x_KRC, row_R * D, mask_R, MAIN, REST, REST_RUN, VECTOR, D)
            if GATED:
                rest_gate_sum += rest_branch.to(tl.float32) * d_x_KRC
                d_branch_KRC = rest_gate_KRC * d_x_KRC
                store_piece(
                    d_branch_ptr, d_branch_KRC, row_R * D, mask_R, MAIN, REST, REST_RUN, VECTOR, D
                )
            if BIASED:
                rest_d_x_sum += d_x_KRC

    partial_ptr += tl.program_id(0).to(tl.int64) * (NUM_SUMS * D)
    store_sums(
        partial_ptr, main_shift_sum, main_scale_sum, main_gate_sum, main_d_x_sum, NUM_SUMS, 0, MAIN, RUN, D
    )  # fmt: skip
    if REST > 0:
        store_sums(
            partial_ptr, rest_shift_sum, rest_scale_sum, rest_gate_sum, rest_d_x_sum, NUM_SUMS,
            MAIN, REST, REST_RUN, D,
        )  # fmt: skip


@triton.jit
def store_modulation(ptr, sums_QC, channel_C, D: tl.constexpr):
    """Adds the lines of a tile and writes what that gives for one sample."""
    value_C = tl.sum(sums_QC, axis=0).to(ptr.dtype.element_ty)
    tl.store(ptr + channel_C, value_C, mask=channel_C < D)


@triton.jit(do_not_specialize=["batch", "num_chunks"])
def finish_kernel(
    partial_ptr,
    gate_ptr,
    bias_ptr,
    d_gate_ptr,
    d_shift_ptr,
    d_scale_ptr,
    d_bias_ptr,
    gate_stride,
    batch,
    num_chunks,
    D: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS_LINES: tl.constexpr,
    BIAS_WIDTH: tl.constexpr,
):
    """The first batch * ceil(D / WIDTH) programs finish one sample's channels each, the others the bias's.

    LINES and BIAS_LINES rows of `partial` are added at a time: a few of one sample, many of all samples.
    """
    NUM_BLOCKS: tl.constexpr = (D + WIDTH - 1) // WIDTH
    if tl.program_id(0) < batch * NUM_BLOCKS:
        b = (tl.program_id(0) // NUM_BLOCKS).to(tl.int64)
        channel_C = tl.program_id(0) % NUM_BLOCKS * WIDTH + tl.arange(0, WIDTH)
        partial_ptr += b * num_chunks * (NUM_SUMS * D)
        zeros_QC = tl.zeros([LINES, WIDTH], tl.float32)
        shift_QC, scale_QC, gate_QC = zeros_QC, zeros_QC, zeros_QC
        for first in range(0, num_chunks, LINES):
            line_Q = first + tl.arange(0, LINES).to(tl.int64)
            mask_QC = (line_Q < num_chunks)[:, None] & (channel_C < D)[None, :]
            ptr_QC = partial_ptr + line_Q[:, None] * (NUM_SUMS * D) + channel_C[None, :]
            shift_QC += tl.load(ptr_QC + SHIFT * D, mask=mask_QC, other=0.0)
            scale_QC += tl.load(ptr_QC + SCALE * D, mask=mask_QC, other=0.0)
            if NUM_SUMS > GATE:
                gate_QC += tl.load(ptr_QC + GATE * D, mask=mask_QC, other=0.0)
            if NUM_SUMS > D_X:
                bias_C = tl.load(bias_ptr + channel_C, mask=channel_C < D, other=0.0).to(tl.float32)
                d_x_QC = tl.load(ptr_QC + D_X * D, mask=mask_QC, other=0.0)
                gate_QC += bias_C[None, :] * d_x_QC
        store_modulation(d_shift_ptr + b * D, shift_QC, channel_C, D)
        store_modulation(d_scale_ptr + b * D, scale_QC, channel_C, D)
        if NUM_SUMS > GATE:
            store_modulation(d_gate_ptr + b * D, gate_QC, channel_C, D)
    elif NUM_SUMS > D_X:
        block = tl.program_id(0) - batch * NUM_BLOCKS
        channel_W = block * BIAS_WIDTH + tl.arange(0, BIAS_WIDTH)
        bias_PW = tl.zeros([BIAS_LINES, BIAS_WIDTH], tl.float32)
        for first in range(0, batch * num_chunks, BIAS_LINES):
            line_P = first + tl.arange(0, BIAS_LINES).to(tl.int64)
            mask_PW = (line_P < batch * num_chunks)[:, None] & (channel_W < D)[None, :]
            offset_PW = (line_P * (NUM_SUMS * D) + D_X * D)[:, None] + channel_W[None, :]
            d_x_PW = tl.load(partial_ptr + offset_PW, mask=mask_PW, other=0.0)
            offset_PW = (line_P // num_chunks * gate_stride)[:, None] + channel_W[None, :]
            gate_PW = tl.load(gate_ptr + offset_PW, mask=mask_PW, other=0.0).to(tl.float32)
            bias_PW += gate_PW * d_x_PW
        store_modulation(d_bias_ptr, bias_PW, channel_W, D)
