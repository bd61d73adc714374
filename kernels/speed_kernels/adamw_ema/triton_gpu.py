"""AdamW + EMA in Triton for NVIDIA GPUs (A100, H100/H200, B200): one launch, for a flat buffer or a list of tensors.

All addresses are 64-bit, all loads and stores of aligned buffers 128 bits wide. The addresses of a list go to the
device as a table; inside a CUDA graph, which would keep the table of the capture, a list is a loop of launches instead.
"""

# N elements of a flat buffer, P partial sums, L tensors of a list.

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from speed_kernels import launch
from speed_kernels.adamw_ema import layout

RAMP_UP_RATE = tl.constexpr(math.log(2.0) / layout.RAMP_UP)

BLOCK = 1024  # elements per program: 8 per thread, two 128-bit loads of float32
NUM_WARPS = 4
MAX_PARTIALS = 2048  # programs of the sum of squares on any device: the order of addition is fixed


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    return launch.unavailable()


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
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _update(
        p_ptr, g_ptr, m_ptr, v_ptr, e1_ptr, e2_ptr, copy_ptr, scalars_ptr, i, i < N, SECOND, COPY
    )


@triton.jit
def _address(table_ptr, type_ptr, ALIGNED: tl.constexpr):
    """The address at `table_ptr`, as a pointer of the type of `type_ptr`."""
    address = tl.load(table_ptr).to(type_ptr.dtype)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
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
    addresses of p, g, m, v, e1, e2 and copy; float_ptr, grad_ptr and copy_ptr only tell types."""
    if tl.load(scalars_ptr) == 0.0:
        return
    block = tl.program_id(0).to(tl.int64)
    low, high = block * 0, block * 0 + L  # the tensor is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row = table_ptr + low
    p_ptr = _address(row + 2 * L, float_ptr, ALIGNED)
    g_ptr = _address(row + 3 * L, grad_ptr, ALIGNED)
    m_ptr = _address(row + 4 * L, float_ptr, ALIGNED)
    v_ptr = _address(row + 5 * L, float_ptr, ALIGNED)
    e1_ptr = _address(row + 6 * L, float_ptr, ALIGNED)
    e2_ptr = _address(row + 7 * L, float_ptr, ALIGNED)
    c_ptr = _address(row + 8 * L, copy_ptr, ALIGNED)
    start = (block - tl.load(row)) * BLOCK
    size = tl.load(row + L)
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:  # a whole block needs no mask that would forbid wide accesses
        whole = tl.full((BLOCK,), True, dtype=tl.int1)
        _update(
            p_ptr, g_ptr, m_ptr, v_ptr, e1_ptr, e2_ptr, c_ptr, scalars_ptr, i, whole, SECOND, COPY
        )
    else:
        part = i < size
        _update(
            p_ptr, g_ptr, m_ptr, v_ptr, e1_ptr, e2_ptr, c_ptr, scalars_ptr, i, part, SECOND, COPY
        )


@triton.jit
def square_kernel(g_ptr, partial_ptr, N, BLOCK: tl.constexpr):
    """partial[program] = sum of squares of every num_programs-th block, in float64."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    while start < N:
        g = tl.load(g_ptr + start + lanes, mask=start + lanes < N, other=0.0).to(tl.float32)
        total += g * g
        start += stride
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total.to(tl.float64), axis=0))


@triton.jit
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


def grad_square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares as float32 []: per-lane float32 sums, float64 from there on. A list goes through foreach norms."""
    if len(grads) > 1:
        norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        return torch.stack(norms).to(torch.float64).square().sum().to(torch.float32)
    (grad,) = grads
    num_partials = min(triton.cdiv(grad.numel(), BLOCK), MAX_PARTIALS)
    partials_P = grad.new_empty(num_partials, dtype=torch.float64)
    total = grad.new_empty((), dtype=torch.float32)
    if num_partials:
        square_kernel[(num_partials,)](
            grad, partials_P, grad.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    square_total_kernel[(1,)](partials_P, total, num_partials, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return total


def prepare(
    step: Tensor,
    skipped: Tensor | None,
    hyper: Tensor,
    square_sum: Tensor | None,
    grad_scale: Tensor | None,
) -> Tensor:
    """The scalars of one step; see op.prepare."""
    scalars = hyper.new_empty(layout.SCALARS_SIZE)
    prepare_kernel[(1,)](
        step,
        step if skipped is None else skipped,
        hyper.contiguous(),
        step if square_sum is None else square_sum,
        step if grad_scale is None else grad_scale,
        scalars,
        SKIPPED=skipped is not None,
        SQUARE_SUM=square_sum is not None,
        GRAD_SCALE=grad_scale is not None,
        num_warps=1,
    )
    return scalars


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    second_emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    scalars: Tensor,
) -> None:
    """One step in place; see op.adamw_ema."""
    capturing = params[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if len(params) > 1 and not capturing:
        streams = (params, grads, exp_avgs, exp_avg_sqs, emas, second_emas, copies)
        _update_list(streams, scalars)
        return
    for index, param in enumerate(params):
        if param.numel() == 0:
            continue
        update_kernel[(triton.cdiv(param.numel(), BLOCK),)](
            param,
            grads[index],
            exp_avgs[index],
            exp_avg_sqs[index],
            emas[index],
            second_emas[index] if second_emas else param,
            copies[index] if copies else param,
            scalars,
            param.numel(),
            SECOND=bool(second_emas),
            COPY=bool(copies),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def _update_list(streams: Sequence[Sequence[Tensor]], scalars: Tensor) -> None:
    """One launch over a list of tensors. The upload of the table does not wait for the device."""
    params, grads, *_, copies = streams
    sizes = [param.numel() for param in params]
    first = list(itertools.accumulate((triton.cdiv(size, BLOCK) for size in sizes), initial=0))
    num_blocks = first.pop()
    if num_blocks == 0:
        return
    addresses = [
        [tensor.data_ptr() for tensor in stream] if stream else [0] * len(sizes)
        for stream in streams
    ]
    table = torch.tensor([first, sizes, *addresses], dtype=torch.int64)
    update_list_kernel[(num_blocks,)](
        table.to(scalars.device, non_blocking=True),
        params[0],
        grads[0],
        copies[0] if copies else params[0],
        scalars,
        len(sizes),
        SECOND=bool(streams[5]),
        COPY=bool(copies),
        ALIGNED=all(address % 16 == 0 for each in addresses for address in each),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
