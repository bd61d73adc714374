"""The noise op as one Triton kernel on CUDA GPUs (A100, H100, H200, B200).

A program handles a run of one sample's elements. It draws the sample's row itself (two dependent loads) or reads the
one that is given, makes four normals per Philox call in the order in which its threads hold consecutive elements, and
moves 128 bits per thread and access. The noise alone comes from the same kernel without a table. Nothing is read on the
host: step and slot come from `address_2`, so a launch can be captured in a CUDA graph.

Shape legend: E elements of a tile, F fan-out of the row search.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from speed_kernels import launch, philox, table
from speed_kernels.triton_philox import normals_tile, philox4x32

TILE = 1024  # elements that a program handles at a time
NUM_WARPS = 4
STREAM_T = tl.constexpr(philox.STREAM_T)
TWO_32 = tl.constexpr(2**32)
NUM_COLUMNS = tl.constexpr(table.NUM_COLUMNS)
A, B = tl.constexpr(table.A), tl.constexpr(table.B)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return launch.unavailable()


@triton.jit
def draw_row(
    cdf_ptr,
    num_rows,
    slot,
    step,
    key0,
    key1,
    num_slots,
    stride,
    STRATIFIED: tl.constexpr,
    FANOUT: tl.constexpr,
):
    """The row of the sample at `slot` (int64), as `speed_kernels.philox.row_draw`. FANOUT^2 >= num_rows."""
    slot_word = slot.to(tl.uint32)
    zero = slot_word ^ slot_word
    v, _, _, _ = philox4x32(zero, slot_word, step, zero + STREAM_T, key0, key1)
    u = v.to(tl.int64)
    if STRATIFIED:
        _, turn, _, _ = philox4x32(zero + 1, zero, step, zero + STREAM_T, key0, key1)
        shift = (turn % num_slots.to(tl.uint32)).to(tl.int64)
        stratum = (slot * stride + shift) % num_slots
        u = ((stratum << 32) + u) // num_slots
    # Two levels: first the last entries of the segments, then the entries of one segment.
    entry_F = tl.arange(0, FANOUT)
    last_F = entry_F * FANOUT + (FANOUT - 1)
    heads = tl.load(cdf_ptr + last_F, mask=last_F < num_rows, other=TWO_32)
    segment = tl.sum((heads <= u).to(tl.int32), axis=0) * FANOUT
    within_F = segment + entry_F
    tails = tl.load(cdf_ptr + within_F, mask=within_F < num_rows, other=TWO_32)
    return tl.minimum(segment + tl.sum((tails <= u).to(tl.int32), axis=0), num_rows - 1)


@triton.jit(
    do_not_specialize=["key0", "key1", "num_slots", "stride", "num_rows", "num_chunks", "num_tiles"]
)
def noise_kernel(
    x0_ptr,
    x_t_ptr,
    cdf_ptr,
    chosen_ptr,
    rows_ptr,
    time_ptr,
    address_ptr,
    row_out_ptr,
    time_out_ptr,
    num_elements,
    num_rows,
    key0,
    key1,
    num_slots,
    stride,
    num_chunks,
    num_tiles,
    ROWS: tl.constexpr,
    STRATIFIED: tl.constexpr,
    FANOUT: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program b * num_chunks + chunk: `num_tiles` tiles of sample b. WIDE: a sample has 2^31 elements or more.

    ROWS: "drawn" by the CDF, "given" by chosen_ptr, or "none": then x_t is the noise, and all but it and the address is
    never touched.
    """
    chunk = tl.program_id(0) % num_chunks
    b = (tl.program_id(0) // num_chunks).to(tl.int64)
    key0 = key0.to(tl.uint32, bitcast=True)
    key1 = key1.to(tl.uint32, bitcast=True)
    step = tl.load(address_ptr).to(tl.uint32)
    slot = tl.load(address_ptr + 1) + b
    if ROWS != "none":
        if ROWS == "drawn":
            row = draw_row(
                cdf_ptr, num_rows, slot, step, key0, key1, num_slots, stride, STRATIFIED, FANOUT
            )
        else:
            row = tl.load(chosen_ptr + b)
        # A row that the table does not have gives a sample and a time that are not numbers.
        valid = (row >= 0) & (row < num_rows)
        if chunk == 0:
            tl.store(row_out_ptr + b, row.to(tl.int64))
            tl.store(time_out_ptr + b, tl.load(time_ptr + row, mask=valid, other=float("nan")))
        columns_ptr = rows_ptr + row * NUM_COLUMNS
        scale = tl.load(columns_ptr + A, mask=valid, other=float("nan"))
        sigma = tl.load(columns_ptr + B, mask=valid, other=float("nan"))

    first_tile = chunk * num_tiles
    if WIDE:
        first_tile = first_tile.to(tl.int64)
    sample = b * num_elements
    for tile in range(num_tiles):
        start = (first_tile + tile) * TILE
        offset_E = start + tl.arange(0, TILE)
        mask_E = offset_E < num_elements
        first_block = (start // 4).to(tl.uint32)
        x_t_E = normals_tile(first_block, slot.to(tl.uint32), step, key0, key1, TILE, RUN)
        if ROWS != "none":
            x0_E = tl.load(x0_ptr + sample + offset_E, mask=mask_E, other=0.0).to(tl.float32)
            x_t_E = scale * x0_E + sigma * x_t_E
        tl.store(x_t_ptr + sample + offset_E, x_t_E.to(x_t_ptr.dtype.element_ty), mask=mask_E)


def fanout(num_rows: int) -> int:
    """Fan-out of the two-level row search."""
    size = 16
    while size * size < num_rows:
        size *= 2
    return size


def noise(
    x0: Tensor,
    cdf_T: Tensor | None,
    rows_T8: Tensor,
    time_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
    row_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.noise.op`. One launch."""
    x0, rows_T8, time_T = (tensor.contiguous() for tensor in (x0, rows_T8, time_T))
    source = cdf_T if row_B is None else row_B
    assert source is not None
    source = source.contiguous()  # of the rows; the kernel reads one of the two
    x_t = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    row_out_B = torch.empty(x0.shape[0], dtype=torch.int64, device=x0.device)
    time_B = torch.empty(x0.shape[0], dtype=torch.float32, device=x0.device)
    _launch(
        "drawn" if row_B is None else "given",
        (x0, x_t, source, source, rows_T8, time_T, address_2.contiguous(), row_out_B, time_B),
        rows_T8.shape[0],
        seed,
        num_slots,
        stratified,
    )
    return x_t, row_out_B, time_B


def normals(address_2: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """See `speed_kernels.noise.op`. One launch."""
    out = torch.empty(shape, dtype=torch.float32, device=address_2.device)
    if out.numel() > 0:
        # `out` stands for tensors that the kernel does not touch.
        tensors = (out, out, out, out, out, out, address_2.contiguous(), out, out)
        _launch("none", tensors, 1, seed, 1, False)
    return out


def _launch(
    rows: str,
    tensors: tuple[Tensor, ...],
    num_rows: int,
    seed: int,
    num_slots: int,
    stratified: bool,
) -> None:
    """The kernel on its nine tensors, in its order; the first two are x0 and x_t."""
    x0, x_t = tensors[:2]
    batch = x_t.shape[0]
    if batch == 0:
        return
    num_elements = x_t.numel() // batch
    num_tiles = launch.tiles_per_program(batch, num_elements, TILE, x_t.device)
    # A sample without elements still draws its row.
    num_chunks = max(1, -(-num_elements // (num_tiles * TILE)))
    with torch.cuda.device_of(x_t):
        noise_kernel[(batch * num_chunks,)](
            *tensors,
            num_elements,
            num_rows,
            *launch.signed_key(seed),
            num_slots,
            philox.stratum_stride(num_slots),
            num_chunks,
            num_tiles,
            ROWS=rows,
            STRATIFIED=stratified,
            FANOUT=fanout(num_rows) if rows == "drawn" else 1,
            TILE=TILE,
            RUN=launch.run_length(x0, x_t),
            WIDE=launch.is_wide(num_elements, TILE),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
