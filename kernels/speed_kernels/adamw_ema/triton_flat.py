"""The Triton kernels of AdamW + EMA over one flat buffer, and the scalars of a step.

All addresses are 64-bit, all loads and stores of aligned buffers 128 bits wide, whatever their length: a whole block is
taken without a mask, which would forbid wide accesses.
"""

# N elements of a flat buffer, P partial sums.

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from speed_kernels.adamw_ema import layout

RAMP_UP_RATE = tl.constexpr(math.log(2.0) / layout.RAMP_UP)
BLOCK = 1024  # elements per program: 8 per thread, two 128-bit loads of float32
NUM_WARPS = 4
THREADS = tl.constexpr(32 * NUM_WARPS)
MAX_PARTIALS = 2048  # programs of the sum of squares on any device: the order of addition is fixed


@triton.jit
def _update(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    e1_ptr,
    e2_ptr,
    copy_ptr,
    scalars_ptr,
    i,
    mask,
    SECOND: tl.constexpr,
    COPY: tl.constexpr,
):
    """AdamW and EMAs of the elements i; the offsets into scalars are those of layout.py."""
    g = tl.load(g_ptr + i, mask=mask).to(tl.float32) * tl.load(scalars_ptr + 1)
    m = tl.load(m_ptr + i, mask=mask)
    v = tl.load(v_ptr + i, mask=mask)
    p = tl.load(p_ptr + i, mask=mask)
    e1 = tl.load(e1_ptr + i, mask=mask)
    m += tl.load(scalars_ptr + 3) * (g - m)
    v = tl.load(scalars_ptr + 2) * v + tl.load(scalars_ptr + 4) * (g * g)
    denom = tl.sqrt(v) * tl.load(scalars_ptr + 7) + tl.load(scalars_ptr + 8)
    p = tl.load(scalars_ptr + 5) * p - tl.load(scalars_ptr + 6) * (m / denom)
    tl.store(m_ptr + i, m, mask=mask)
    tl.store(v_ptr + i, v, mask=mask)
    tl.store(p_ptr + i, p, mask=mask)
    tl.store(e1_ptr + i, e1 + tl.load(scalars_ptr + 9) * (p - e1), mask=mask)
    if SECOND:
        e2 = tl.load(e2_ptr + i, mask=mask)
        tl.store(e2_ptr + i, e2 + tl.load(scalars_ptr + 10) * (p - e2), mask=mask)
    if COPY:
        tl.store(copy_ptr + i, p.to(tl.bfloat16), mask=mask)


@triton.jit
def update_block(
    p_ptr, g_ptr, m_ptr, v_ptr, e1_ptr, e2_ptr, copy_ptr, scalars_ptr, left,
    SECOND: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first BLOCK of `left` elements, or as many as there are: those an element per thread at a time."""
    if left >= BLOCK:
        i = tl.arange(0, BLOCK)
        whole = tl.full((BLOCK,), True, dtype=tl.int1)
        _update(
            p_ptr,
            g_ptr,
            m_ptr,
            v_ptr,
            e1_ptr,
            e2_ptr,
            copy_ptr,
            scalars_ptr,
            i,
            whole,
            SECOND,
            COPY,
        )
    else:
        for first in range(0, left.to(tl.int32), THREADS):
            i = first + tl.arange(0, THREADS)
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, e1_ptr, e2_ptr, copy_ptr, scalars_ptr, i, i < left, SECOND, COPY
            )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def update_kernel(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    e1_ptr,
    e2_ptr,
    copy_ptr,
    scalars_ptr,
    N,
    SECOND: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of a flat buffer per program."""
    if tl.load(scalars_ptr) == 0.0:
        return
    start = tl.program_id(0).to(tl.int64) * BLOCK
    update_block(
        p_ptr + start, g_ptr + start, m_ptr + start, v_ptr + start, e1_ptr + start, e2_ptr + start, copy_ptr + start,
        scalars_ptr, N - start, SECOND, COPY, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def square_kernel(g_ptr, partial_ptr, N, BLOCK: tl.constexpr):
    """partial[program] = sum of squares of every num_programs-th block, in float64."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    while start + BLOCK <= N:
        g = tl.load(g_ptr + start + lanes).to(tl.float32)
        total += g * g
        start += stride
    if start < N:
        g = tl.load(g_ptr + start + lanes, mask=start + lanes < N, other=0.0).to(tl.float32)
        total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=["P"])
def square_total_kernel(partial_ptr, total_ptr, P, BLOCK: tl.constexpr):
    """total = sum of all partial sums, by one program, in a fixed order."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, P, BLOCK):
        total += tl.load(partial_ptr + start + lanes, mask=start + lanes < P, other=0.0)
    tl.store(total_ptr, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def _ema_weight(kind, value, t):
    warmup = tl.maximum(value, 9.0 / (9.0 + t))
    power = 1.0 - tl.exp((value + 1.0) * tl.log(tl.maximum(1.0 - 1.0 / t, 1e-300)))
    ramp_up = RAMP_UP_RATE / tl.maximum(
        t - 1.0, 1e-3
    )  # at t = 1: 1 - e^-10^4, the weights themselves
    half_life = 1.0 - tl.exp(-tl.maximum(value, ramp_up))
    weight = tl.where(kind == 3.0, half_life, value)
    return tl.where(kind == 1.0, warmup, tl.where(kind == 2.0, power, weight))


@triton.jit
def prepare_kernel(
    step_ptr,
    skipped_ptr,
    hyper_ptr,
    square_sum_ptr,
    grad_scale_ptr,
    scalars_ptr,
    SKIPPED: tl.constexpr,
    SQUARE_SUM: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
):
    """The scalars of one step in double precision, by one program; offsets are those of layout.py."""
    scale = tl.full((), 1.0, dtype=tl.float32)
    if GRAD_SCALE:
        scale = tl.load(grad_scale_ptr)
    finite = tl.abs(scale) < float("inf")
    norm = tl.full((), 0.0, dtype=tl.float64)
    if SQUARE_SUM:
        square_sum = tl.load(square_sum_ptr)
        finite = finite & (square_sum < float("inf"))
        norm = tl.abs(scale).to(tl.float64) * tl.sqrt(square_sum.to(tl.float64))
    step = tl.load(step_ptr) + tl.where(finite, 1.0, 0.0)
    tl.store(step_ptr, step)
    if SKIPPED:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(finite, 0.0, 1.0))
    t = tl.maximum(step, 1.0).to(tl.float64)
    lr = tl.load(hyper_ptr).to(tl.float64)
    weight1 = tl.load(hyper_ptr + 1).to(tl.float64)
    weight2 = tl.load(hyper_ptr + 2).to(tl.float64)
    weight_decay = tl.load(hyper_ptr + 4).to(tl.float64)
    clip = tl.load(hyper_ptr + 5).to(tl.float64)
    factor = tl.where(clip > 0.0, tl.minimum(1.0, clip / (norm + 1e-6)), 1.0)
    log_beta1 = tl.log(tl.maximum(1.0 - weight1, 1e-300))
    log_beta2 = tl.log(tl.maximum(1.0 - weight2, 1e-300))
    tl.store(scalars_ptr, tl.where(finite, 1.0, 0.0))
    tl.store(scalars_ptr + 1, (scale * factor).to(tl.float32))
    tl.store(scalars_ptr + 2, (1.0 - weight2).to(tl.float32))
    tl.store(scalars_ptr + 3, weight1.to(tl.float32))
    tl.store(scalars_ptr + 4, weight2.to(tl.float32))
    tl.store(scalars_ptr + 5, (1.0 - lr * weight_decay).to(tl.float32))
    tl.store(scalars_ptr + 6, (lr / (1.0 - tl.exp(t * log_beta1))).to(tl.float32))
    tl.store(scalars_ptr + 7, (1.0 / tl.sqrt(1.0 - tl.exp(t * log_beta2))).to(tl.float32))
    tl.store(scalars_ptr + 8, tl.load(hyper_ptr + 3))
    kind1 = tl.load(hyper_ptr + 6)
    kind2 = tl.load(hyper_ptr + 8)
    value1 = tl.load(hyper_ptr + 7).to(tl.float64)
    value2 = tl.load(hyper_ptr + 9).to(tl.float64)
    tl.store(scalars_ptr + 9, _ema_weight(kind1, value1, t).to(tl.float32))
    tl.store(scalars_ptr + 10, _ema_weight(kind2, value2, t).to(tl.float32))
    tl.store(scalars_ptr + 11, norm.to(tl.float32))
