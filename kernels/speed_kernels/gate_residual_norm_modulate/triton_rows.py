"""Rows of D channels in the registers of a GPU's threads: how they are cut, loaded, stored and summed.

A row is cut into two pieces, a main one of the largest power of two in D and a rest of a power of two, masked where the
two are more than D: 384 = 256 + 128, 768 = 512 + 256, 1024 and 1152 = 1024 + 128 waste no lane; 1028 = 1024 + 4 wastes
the rest of 32 lanes or more. A piece is a tile of R rows of K runs of C channels. Triton deals warps out along C first,
then along the rows, so that the warps of a row are as many as C needs and K stays in the thread. For that the rows must
be the dimension that comes second in Triton's order: Triton 3.7 and newer take the one before the last, older ones the
first. A tile is [K, R, C] there and [R, K, C] here; `_KRC` names both.

Shape legend: K runs, R rows, C channels of a run, L lanes (threads) of a row.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

ROWS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


def pieces(num_channels: int, vector: int, warps_per_row: int) -> dict[str, int]:
    """The kernels' constants for rows of `num_channels`, `vector` elements per access and so many warps to a row."""
    main = 1 << (num_channels.bit_length() - 1)
    lanes = min(32 * warps_per_row, max(1, main // vector))
    run = min(main, vector * lanes)
    rest = num_channels - main
    if rest:
        rest = max(lanes, (1 << (rest - 1).bit_length()))
    return {
        "D": num_channels, "MAIN": main, "RUN": run, "REST": rest, "REST_RUN": min(rest, run), "LANES": lanes,
        "VECTOR": vector,
    }  # fmt: skip


@triton.jit
def per_row(value_R):
    """A number of each row, beside a tile."""
    if ROWS_FIRST:
        value_KRC = value_R[:, None, None]
    else:
        value_KRC = value_R[None, :, None]
    return value_KRC


@triton.jit
def zeros(WIDTH: tl.constexpr, RUN: tl.constexpr, ROWS: tl.constexpr):
    if ROWS_FIRST:
        zeros_KRC = tl.zeros([ROWS, WIDTH // RUN, RUN], tl.float32)
    else:
        zeros_KRC = tl.zeros([WIDTH // RUN, ROWS, RUN], tl.float32)
    return zeros_KRC


@triton.jit
def over_rows(value_KRC):
    """[K, C]: sums over the rows."""
    return tl.sum(value_KRC, axis=0 if ROWS_FIRST else 1)


@triton.jit
def channels(FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr):
    """Numbers of a piece's channels, for all rows. No access is to be wider than VECTOR elements."""
    channel_C = tl.arange(0, RUN)
    if RUN > VECTOR:
        channel_C = tl.max_contiguous(channel_C, VECTOR)
    run_K = tl.arange(0, WIDTH // RUN) * RUN
    if ROWS_FIRST:
        run_KRC = run_K[None, :, None]
    else:
        run_KRC = run_K[:, None, None]
    return FIRST + run_KRC + channel_C[None, None, :]


@triton.jit
def piece_mask(
    mask_R, FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Which elements of a piece exist; a constant along the channels where all of them do."""
    mask_KRC = per_row(mask_R)
    if FIRST + WIDTH > D:
        mask_KRC = mask_KRC & (channels(FIRST, WIDTH, RUN, VECTOR) < D)
    return mask_KRC


@triton.jit
def load_piece(
    ptr, offset_R, mask_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Elements of rows that begin at offset_R; zero where there are none."""
    offset_KRC = per_row(offset_R) + channels(FIRST, WIDTH, RUN, VECTOR)
    mask_KRC = piece_mask(mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    return tl.load(ptr + offset_KRC, mask=mask_KRC, other=0.0)


@triton.jit
def store_piece(
    ptr, value_KRC, offset_R, mask_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    offset_KRC = per_row(offset_R) + channels(FIRST, WIDTH, RUN, VECTOR)
    mask_KRC = piece_mask(mask_R, FIRST, WIDTH, RUN, VECTOR, D)
    tl.store(ptr + offset_KRC, value_KRC.to(ptr.dtype.element_ty), mask=mask_KRC)


@triton.jit
def load_sample(
    ptr, mask_R,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """As float32: one row for all R, each thread's part loaded by that thread."""
    return load_piece(ptr, mask_R.to(tl.int32) * 0, mask_R, FIRST, WIDTH, RUN, VECTOR, D).to(
        tl.float32
    )


@triton.jit
def laned(value_KRC, LANES: tl.constexpr):
    """A tile with what one thread holds of a run as its last dimension."""
    LANE: tl.constexpr = value_KRC.shape[2] // LANES
    return tl.reshape(value_KRC, [value_KRC.shape[0], value_KRC.shape[1], LANES, LANE])


@triton.jit
def per_lane(value_KRC, LANES: tl.constexpr):
    """[R, L]: sums of what a thread holds of a row."""
    return tl.sum(tl.sum(laned(value_KRC, LANES), axis=3), axis=1 if ROWS_FIRST else 0)
