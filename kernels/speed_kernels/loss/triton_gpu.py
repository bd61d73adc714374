"""The loss op as one Triton kernel on CUDA GPUs (A100, H100, H200, B200).

A program takes a run of one sample's elements: it makes the noise again, writes the gradient and keeps two partial
sums. The program that finishes last adds all partial sums. Who is last is told by a counter, the only atomic; sums are
taken in a fixed order, so that every run gives the same result. The last program sets the counter back to zero, so a
caller that keeps it pays one launch a call and no fill. Nothing is read on the host: a CUDA graph can capture it all.

Shape legend: E elements of a tile, K lanes of a program, S samples and C chunks of samples in the last sum.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speed_kernels import launch, table
from speed_kernels.triton_philox import normals_tile

TILE = 1024
ROW_0_TILE = tl.constexpr(512)
NUM_WARPS = 4
LAST_TILE = 512  # partial sums that the last program adds at a time, of
LAST_SAMPLES = 64  # at most so many samples
NUM_COLUMNS = tl.constexpr(table.NUM_COLUMNS)
C, D, W = (tl.constexpr(index) for index in (table.C, table.D, table.W))
LOGVAR_MIN, LOGVAR_MAX = tl.constexpr(table.LOGVAR_MIN), tl.constexpr(table.LOGVAR_MAX)
MEAN_GAP = tl.constexpr(table.MEAN_GAP)
BITS_PER_NAT = tl.constexpr(1.4426950408889634)
BINS = tl.constexpr(255.0)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return launch.unavailable()


@triton.jit
def one_minus_exp_ratio(y):
    """(1 - exp(-y)) / y for |y| <= 0.35: where the difference would cancel."""
    p = 0.008370300754904747 - 0.0013888867106288671 * y
    p = 0.04166717082262039 - p * y
    p = 0.1666649430990219 - p * y
    p = 0.4999999701976776 - p * y
    return 1.0 - p * y


@triton.jit
def divergence(error, v, spread, gap_precision):
    """KL(true posterior || model) in nats and its slope by the model's log variance."""
    y = (v + 1.0) * (0.5 * spread)  # log variance above LOGVAR_MIN
    e = tl.exp(-y)
    e_minus_1 = tl.where(tl.abs(y) < 0.34, -y * one_minus_exp_ratio(y), e - 1.0)
    gap = e * (gap_precision * (error * error))
    return 0.5 * ((y + e_minus_1) + gap), -0.5 * (e_minus_1 + gap)


@triton.jit
def bounded(x, BOUND: tl.constexpr):
    """x within [-BOUND, BOUND]; not a number stays so."""
    y = tl.where(x < -BOUND, -BOUND, x)
    return tl.where(y > BOUND, BOUND, y)


@triton.jit
def likelihood(error, x0, v, spread, log_var_min, mean_gap):
    """-ln of the mass of x0's bin of width 2/255 in nats, and its slope by the log variance.

    The distribution function is the logistic function s of q(z) = 2 sqrt(2/pi) (z + 0.044715 z^3), and
    s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)) keeps its relative accuracy in the tails.
    """
    inverse_std = tl.exp(-0.5 * (log_var_min + (v + 1.0) * (0.5 * spread)))
    centre = mean_gap * error
    p = bounded(inverse_std * (centre + 1.0 / BINS), 100.0)
    m = bounded(inverse_std * (centre - 1.0 / BINS), 100.0)
    e_upper = tl.exp(-bounded(1.5957691216057308 * p * (1.0 + 0.044715 * (p * p)), 60.0))
    e_lower = tl.exp(-bounded(1.5957691216057308 * m * (1.0 + 0.044715 * (m * m)), 60.0))
    cdf_upper = 1.0 / (1.0 + e_upper)
    cdf_lower = 1.0 / (1.0 + e_lower)
    squares = 0.044715 * (p * p + p * m + m * m)
    width = (1.5957691216057308 * 2.0 / BINS) * inverse_std
    d_width = -0.5 * width * (1.0 + 3.0 * squares)
    width = width * (1.0 + squares)
    # 1 - exp(-width)
    e_width = tl.exp(-width)
    inside = tl.where(width < 0.34, width * one_minus_exp_ratio(width), 1.0 - e_width)

    left = x0 < -0.999
    right = x0 > 0.999
    mass_upper = tl.where(right, 1.0, cdf_upper)
    mass_lower = tl.where(left, 1.0, e_lower * cdf_lower)
    mass = mass_upper * mass_lower * tl.where(left | right, 1.0, inside)
    # Derivatives of ln mass: of s(a), of s(-b) and of the difference.
    d_upper = e_upper * cdf_upper * (-0.7978845608028654 * p * (1.0 + 0.134145 * (p * p)))
    d_lower = cdf_lower * (0.7978845608028654 * m * (1.0 + 0.134145 * (m * m)))
    slope = tl.where(right, 0.0, d_upper) + tl.where(left, 0.0, d_lower)
    slope += tl.where(left | right, 0.0, d_width * e_width / inside)
    clamped = tl.where(mass < 1e-12, 1e-12, mass)
    return -tl.log(clamped), tl.where(mass < 1e-12, 0.0, -slope)


@triton.jit
def run_tiles(
    first,
    num_tiles,
    slot,
    step,
    key0,
    key1,
    num_elements,
    x0_ptr,
    out_ptr,
    grad_ptr,
    target_x0,
    target_eps,
    mse_gradient,
    spread,
    log_var_min,
    mean_gap,
    vb_gradient,
    LEARNED: tl.constexpr,
    ROW_0: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Gradients of `num_tiles` tiles of one sample from element `first` on, and their sums of squares and of nats."""
    square_K = tl.zeros([TILE // RUN], tl.float32)
    bound_K = tl.zeros([TILE // RUN], tl.float32)
    gap_precision = mean_gap * mean_gap * tl.exp(-log_var_min)
    for tile in range(num_tiles):
        start = first + tile * TILE
        offset_E = start + tl.arange(0, TILE)
        mask_E = offset_E < num_elements
        x0_E = tl.load(x0_ptr + offset_E, mask_E, 0.0).to(tl.float32)
        f_E = tl.load(out_ptr + offset_E, mask_E, 0.0).to(tl.float32)
        if LEARNED:
            v_E = tl.load(out_ptr + num_elements + offset_E, mask_E, 0.0).to(tl.float32)
        eps_E = normals_tile((start // 4).to(tl.uint32), slot, step, key0, key1, TILE, RUN)
        error_E = tl.where(mask_E, f_E - (target_x0 * x0_E + target_eps * eps_E), 0.0)
        square_K += tl.sum(tl.reshape(error_E * error_E, [TILE // RUN, RUN]), axis=1)
        grad_E = (mse_gradient * error_E).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + offset_E, grad_E, mask_E)
        if LEARNED:
            if ROW_0:
                nats_E, slope_E = likelihood(error_E, x0_E, v_E, spread, log_var_min, mean_gap)
            else:
                nats_E, slope_E = divergence(error_E, v_E, spread, gap_precision)
            nats_E = tl.where(mask_E, nats_E, 0.0)
            bound_K += tl.sum(tl.reshape(nats_E, [TILE // RUN, RUN]), axis=1)
            grad_v_E = (vb_gradient * slope_E).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + num_elements + offset_E, grad_v_E, mask_E)
    return tl.sum(square_K, axis=0), tl.sum(bound_K, axis=0)


@triton.jit
def sum_of_chunks(ptr, b_S, batch, num_chunks, CHUNKS: tl.constexpr, SAMPLES: tl.constexpr):
    """Sums over the chunks of samples b_S of [num_chunks, batch] floats that others wrote, in a fixed order."""
    total_S = tl.zeros([SAMPLES], tl.float32)
    for first in range(0, num_chunks, CHUNKS):
        chunk_C = first + tl.arange(0, CHUNKS)
        mask_CS = (chunk_C < num_chunks)[:, None] & (b_S < batch)[None, :]
        at_CS = chunk_C.to(tl.int64)[:, None] * batch + b_S[None, :]
        # Past this processor's first-level cache, which knows nothing of the others' stores.
        total_S += tl.sum(tl.load(ptr + at_CS, mask_CS, 0.0, cache_modifier=".cg"), axis=0)
    return total_S


@triton.jit
def finish(
    partial_ptr,
    row_ptr,
    rows_ptr,
    total_ptr,
    losses_ptr,
    batch,
    num_chunks,
    num_rows,
    inverse_elements,
    vb_scale,
    grad_scale,
    LEARNED: tl.constexpr,
    WEIGHT_VB: tl.constexpr,
    CHUNKS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """The samples' losses and their scaled sum from everybody's partial sums."""
    batch_64 = batch.to(tl.int64)
    all_S = tl.zeros([SAMPLES], tl.float32)
    for first in range(0, batch, SAMPLES):
        b_S = first + tl.arange(0, SAMPLES)
        mask_S = b_S < batch
        row_S = tl.load(row_ptr + b_S, mask_S, 0)
        valid_S = (row_S >= 0) & (row_S < num_rows)
        weight_S = tl.load(rows_ptr + row_S * NUM_COLUMNS + W, valid_S, float("nan"))
        mse_S = sum_of_chunks(partial_ptr, b_S, batch, num_chunks, CHUNKS, SAMPLES)
        mse_S = mse_S * inverse_elements
        vb_S = tl.zeros([SAMPLES], tl.float32)
        loss_S = weight_S * mse_S
        if LEARNED:
            bounds_ptr = partial_ptr + batch_64 * num_chunks
            vb_S = sum_of_chunks(bounds_ptr, b_S, batch, num_chunks, CHUNKS, SAMPLES)
            vb_S = vb_S * (inverse_elements * BITS_PER_NAT)
            if WEIGHT_VB:
                loss_S += vb_scale * weight_S * vb_S
            else:
                loss_S += vb_scale * vb_S
        tl.store(losses_ptr + b_S, loss_S, mask_S)
        tl.store(losses_ptr + batch_64 + b_S, mse_S, mask_S)
        tl.store(losses_ptr + 2 * batch_64 + b_S, vb_S, mask_S)
        all_S += tl.where(mask_S, loss_S, 0.0)
    tl.store(total_ptr, tl.sum(all_S, axis=0) * grad_scale)


@triton.jit(do_not_specialize=["key0", "key1", "num_rows", "batch", "num_chunks", "num_tiles"])
def loss_kernel(
    out_ptr,
    x0_ptr,
    row_ptr,
    rows_ptr,
    address_ptr,
    grad_ptr,
    partial_ptr,
    ticket_ptr,
    total_ptr,
    losses_ptr,
    num_elements,
    num_rows,
    key0,
    key1,
    batch,
    num_chunks,
    num_tiles,
    inverse_elements,
    vb_scale,
    grad_scale,
    LEARNED: tl.constexpr,
    WEIGHT_VB: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Program b * num_chunks + chunk: `num_tiles` tiles of sample b. WIDE: a sample has 2^31 elements or more."""
    chunk = tl.program_id(0) % num_chunks
    b = (tl.program_id(0) // num_chunks).to(tl.int64)
    key0 = key0.to(tl.uint32, bitcast=True)
    key1 = key1.to(tl.uint32, bitcast=True)
    step = tl.load(address_ptr).to(tl.uint32)
    slot = (tl.load(address_ptr + 1) + b).to(tl.uint32)
    row = tl.load(row_ptr + b)
    # A row that the table does not have gives losses and gradients that are not a number.
    valid = (row >= 0) & (row < num_rows)
    columns_ptr = rows_ptr + row * NUM_COLUMNS
    target_x0 = tl.load(columns_ptr + C, mask=valid, other=float("nan"))
    target_eps = tl.load(columns_ptr + D, mask=valid, other=float("nan"))
    weight = tl.load(columns_ptr + W, mask=valid, other=float("nan"))
    mse_gradient = 2.0 * grad_scale * inverse_elements * weight
    if LEARNED:
        log_var_min = tl.load(columns_ptr + LOGVAR_MIN, mask=valid, other=float("nan"))
        spread = tl.load(columns_ptr + LOGVAR_MAX, mask=valid, other=float("nan")) - log_var_min
        mean_gap = tl.load(columns_ptr + MEAN_GAP, mask=valid, other=float("nan"))
        vb_gradient = grad_scale * vb_scale * inverse_elements * BITS_PER_NAT * 0.5 * spread
        if WEIGHT_VB:
            vb_gradient = vb_gradient * weight
        out_sample = b * 2 * num_elements
    else:
        spread, log_var_min, mean_gap, vb_gradient = 0.0, 0.0, 0.0, 0.0
        out_sample = b * num_elements

    first = chunk * (num_tiles * TILE)
    if WIDE:
        first = chunk.to(tl.int64) * (num_tiles * TILE)
    if LEARNED and row == 0:
        # Smaller tiles: the likelihood needs more registers than all the rest.
        square, bound = run_tiles(
            first, num_tiles * (TILE // ROW_0_TILE), slot, step, key0, key1, num_elements,
            x0_ptr + b * num_elements, out_ptr + out_sample, grad_ptr + out_sample,
            target_x0, target_eps, mse_gradient, spread, log_var_min, mean_gap, vb_gradient,
            LEARNED, True, ROW_0_TILE, 4,
        )  # fmt: skip
    else:
        square, bound = run_tiles(
            first, num_tiles, slot, step, key0, key1, num_elements,
            x0_ptr + b * num_elements, out_ptr + out_sample, grad_ptr + out_sample,
            target_x0, target_eps, mse_gradient, spread, log_var_min, mean_gap, vb_gradient,
            LEARNED, False, TILE, RUN,
        )  # fmt: skip

    # The ticket is drawn after this program's stores; what the drawer of the last one reads comes after all tickets.
    tl.store(partial_ptr + chunk.to(tl.int64) * batch + b, square)
    if LEARNED:
        bounds_ptr = partial_ptr + batch.to(tl.int64) * num_chunks
        tl.store(bounds_ptr + chunk.to(tl.int64) * batch + b, bound)
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        finish(
            partial_ptr, row_ptr, rows_ptr, total_ptr, losses_ptr, batch, num_chunks, num_rows,
            inverse_elements, vb_scale, grad_scale, LEARNED, WEIGHT_VB, CHUNKS, SAMPLES,
        )  # fmt: skip
        tl.store(ticket_ptr, 0)


def loss(
    out: Tensor,
    x0: Tensor,
    row_B: Tensor,
    rows_T8: Tensor,
    address_2: Tensor,
    seed: int,
    learned_variance: bool,
    vb_scale: float,
    weight_vb: bool,
    grad_scale: float,
    ticket: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.loss.op`. One launch; without a `ticket`, after a fill of a new one."""
    out, x0, row_B, rows_T8, address_2 = (
        tensor.contiguous() for tensor in (out, x0, row_B, rows_T8, address_2)
    )
    batch, device = x0.shape[0], x0.device
    grad_out = torch.empty(out.shape, dtype=out.dtype, device=device)
    losses_3B = torch.empty(3, batch, dtype=torch.float32, device=device)
    if x0.numel() == 0:
        mean_of_nothing = 0.0 if batch == 0 else float("nan")
        return (
            out.new_full((), mean_of_nothing, dtype=torch.float32),
            losses_3B.fill_(mean_of_nothing),
            grad_out,
        )
    total = torch.empty((), dtype=torch.float32, device=device)
    num_elements = x0.numel() // batch
    num_tiles = launch.tiles_per_program(batch, num_elements, TILE, device)
    num_chunks = -(-num_elements // (num_tiles * TILE))
    partial = torch.empty(2 * num_chunks * batch, dtype=torch.float32, device=device)
    if ticket is None:
        ticket = torch.zeros(1, dtype=torch.int32, device=device)
    samples = min(LAST_SAMPLES, (1 << (batch - 1).bit_length()))
    with torch.cuda.device_of(x0):
        loss_kernel[(batch * num_chunks,)](
            out,
            x0,
            row_B,
            rows_T8,
            address_2,
            grad_out,
            partial,
            ticket,
            total,
            losses_3B,
            num_elements,
            rows_T8.shape[0],
            *launch.signed_key(seed),
            batch,
            num_chunks,
            num_tiles,
            1.0 / num_elements,
            float(vb_scale),
            float(grad_scale),
            LEARNED=learned_variance,
            WEIGHT_VB=weight_vb,
            TILE=TILE,
            RUN=launch.run_length(out, x0),
            WIDE=launch.is_wide(num_elements, TILE),
            CHUNKS=LAST_TILE // samples,
            SAMPLES=samples,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return total, losses_3B, grad_out
