"""Rows of D channels in the registers of a GPU's threads: how they are cut, loaded, stored and summed.

A row is cut into two pieces, a main one of the largest power of two in D and a rest of a power of two, masked where the
two are more than D: 384 = 256 + 128, 768 = 512 + 256, 1024 and 1152 = 1024 + 128 waste no lane; 1028 = 1024 + 4 wastes
the rest of 32 lanes or more. A piece is a tile [K, R, C] of K runs of C channels: Triton deals warps out along the last
dimension and then along the one before, so that the warps of a row are as many as C needs and K stays in the thread.

Shape legend: K runs, R rows, C channels of a run, L lanes (threads) of a row.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


def pieces(num_channels: int, vector: int, warps_per_row: int) -> dict[str, int]:
    """The kernels' constants for rows of `num_channels`, `vector` elements per access and so many warps to a row."""
    main = 1 << (num_channels.bit_length() - 1)
    lanes = min(32 * warps_per_row, max(1, main // vector))
    run = min(main, vector * lanes)
    rest = num_channels - main
    if rest:
        rest = max(lanes, triton.next_power_of_2(rest))
    return {
        "D": num_channels, "MAIN": main, "RUN": run, "REST": rest, "REST_RUN": min(rest, run), "LANES": lanes,
        "VECTOR": vector,
    }  # fmt: skip


@triton.jit
def channels(FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr):
    """[K, 1, C] numbers of a piece's channels. No access is to be wider than VECTOR elements."""
    channel_C = tl.arange(0, RUN)
    if RUN > VECTOR:
        channel_C = tl.max_contiguous(channel_C, VECTOR)
    return FIRST + (tl.arange(0, WIDTH // RUN) * RUN)[:, None, None] + channel_C[None, None, :]


@triton.jit
def piece_mask(
    mask_R, FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Which elements of a piece exist; a constant along the channels where all of them do."""
    mask_KRC = mask_R[None, :, None]
    if FIRST + WIDTH > D:
        mask_KRC = mask_KRC & (channels(FIRST, WIDTH, RUN, VECTOR) < D)
    return mask_KRC


@triton.jit
def load_piece(
    ptr, offset_R, mask_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[K, R, C] elements of rows that begin at offset_R; zero where there are none."""
    offset_KRC = offset_R[None, :, None] + channels(FIRST, WIDTH, RUN, VECTOR)
    mask_KRC = piece_mask(mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    return tl.load(ptr + offset_KRC, mask=mask_KRC, other=0.0)


@triton.jit
def store_piece(
    ptr, value_KRC, offset_R, mask_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    offset_KRC = offset_R[None, :, None] + channels(FIRST, WIDTH, RUN, VECTOR)
    mask_KRC = piece_mask(mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    tl.store(ptr + offset_KRC, value_KRC.to(ptr.dtype.element_ty), mask=mask_KRC)


@triton.jit
def load_sample(
    ptr, mask_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[K, R, C] as float32: one row for all R, each thread's part loaded by that thread."""
    return load_piece(ptr, mask_R.to(tl.int32) * 0, mask_R, FIRST, WIDTH, RUN, VECTOR, D).to(
        tl.float32
    )


@triton.jit
def per_lane(value_KRC, LANES: tl.constexpr):
    """[R, L]: sums of what a thread holds of a row."""
    K: tl.constexpr = value_KRC.shape[0]
    ROWS: tl.constexpr = value_KRC.shape[1]
    value_KRLV = tl.reshape(value_KRC, [K, ROWS, LANES, value_KRC.shape[2] // LANES])
    return tl.sum(tl.sum(value_KRLV, axis=3), axis=0)
