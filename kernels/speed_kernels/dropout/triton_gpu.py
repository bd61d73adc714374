"""Addressed dropout as one Triton kernel on CUDA GPUs (A100, H100, H200, B200).

A program handles a run of one sample's elements: four words per Philox call in the order in which its threads hold
consecutive elements, 128 bits per thread and access. Seed, step and slot come from `address_3`, so a launch can be
captured in a CUDA graph.

Shape legend: E elements of a tile, K blocks of four elements.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speed_kernels import launch, philox
from speed_kernels.dropout.op import threshold
from speed_kernels.triton_philox import philox4x32

TILE = 1024  # elements that a program handles at a time
NUM_WARPS = 4
STREAM_DROPOUT = tl.constexpr(philox.STREAM_DROPOUT)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return launch.unavailable()


@triton.jit
def words_tile(first_block, slot, step, stream, key0, key1, TILE: tl.constexpr, RUN: tl.constexpr):
    """The words of TILE consecutive elements; RUN of them, 4 or 8, stay together in a thread."""
    lane_K = tl.arange(0, TILE // RUN).to(tl.uint32)
    if RUN == 4:
        r0, r1, r2, r3 = philox4x32(first_block + lane_K, slot, step, stream, key0, key1)
        words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    else:
        block_K = first_block + 2 * lane_K
        a0, a1, a2, a3 = philox4x32(block_K, slot, step, stream, key0, key1)
        b0, b1, b2, b3 = philox4x32(block_K + 1, slot, step, stream, key0, key1)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
        words = tl.join(even, odd)
    return tl.reshape(words, [TILE])


@triton.jit(do_not_specialize=["layer", "threshold", "scale", "num_chunks", "num_tiles"])
def dropout_kernel(
    x_ptr,
    y_ptr,
    address_ptr,
    num_elements,
    layer,
    threshold,
    scale,
    num_chunks,
    num_tiles,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program b * num_chunks + chunk: `num_tiles` tiles of sample b. WIDE: a sample has 2^31 elements or more."""
    chunk = tl.program_id(0) % num_chunks
    b = (tl.program_id(0) // num_chunks).to(tl.int64)
    seed = tl.load(address_ptr)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    step = tl.load(address_ptr + 1).to(tl.uint32)
    slot = (tl.load(address_ptr + 2) + b).to(tl.uint32)
    stream = layer.to(tl.uint32) * 256 + STREAM_DROPOUT
    limit = threshold.to(tl.uint32, bitcast=True)
    first_tile = chunk * num_tiles
    if WIDE:
        first_tile = first_tile.to(tl.int64)
    sample = b * num_elements
    for tile in range(num_tiles):
        start = (first_tile + tile) * TILE
        offset_E = start + tl.arange(0, TILE)
        mask_E = offset_E < num_elements
        first_block = (start // 4).to(tl.uint32)
        word_E = words_tile(first_block, slot, step, stream, key0, key1, TILE, RUN)
        x_E = tl.load(x_ptr + sample + offset_E, mask=mask_E, other=0.0).to(tl.float32)
        y_E = tl.where(word_E >= limit, x_E * scale, 0.0)
        tl.store(y_ptr + sample + offset_E, y_E.to(y_ptr.dtype.element_ty), mask=mask_E)


def dropout(x_BCHW: Tensor, address_3: Tensor, layer: int, p: float) -> Tensor:
    """See `speed_kernels.dropout.op`; x is in channels-last memory and not empty. One launch."""
    y_BCHW = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    batch, num_elements = x_BCHW.shape[0], x_BCHW[0].numel()
    num_tiles = launch.tiles_per_program(batch, num_elements, TILE, x_BCHW.device)
    num_chunks = -(-num_elements // (num_tiles * TILE))
    limit = threshold(p)
    with torch.cuda.device_of(x_BCHW):
        dropout_kernel[(batch * num_chunks,)](
            x_BCHW,
            y_BCHW,
            address_3.contiguous(),
            num_elements,
            layer,
            limit - 2**32 if limit >= 2**31 else limit,  # the same bits as int32
            1.0 / (1.0 - p),
            num_chunks,
            num_tiles,
            TILE=TILE,
            RUN=launch.run_length(x_BCHW),
            WIDE=launch.is_wide(num_elements, TILE),
            num_warps=NUM_WARPS,
        )
    return y_BCHW
