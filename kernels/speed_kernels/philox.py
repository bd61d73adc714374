"""Addressed randomness: every random number is a pure function of (seed, step, global sample slot, element, stream).

This is the exact reference in plain torch (int64 arithmetic masked to 32 bits, any device) of what the C++ and Triton
kernels compute. It knows Philox4x32-10, normals by Box-Muller and the integer recipe that draws rows of a step table;
it knows nothing of tables, models or losses.

Generator: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
key = (seed & 0xffffffff, seed >> 32); counter = (block of four elements, global sample slot, step, stream).

Shape legend: B samples, N elements of a sample, K blocks of four elements, T rows of a table.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# Streams: the last word of the counter. Two uses of randomness never share a stream.
STREAM_T = 0  # the draw of the time step
STREAM_EPS = 1  # the noise of the forward process
STREAM_LABEL_DROP = 2
STREAM_FLIP = 3
STREAM_ORDER = 4
STREAM_SAMPLE = 6  # noise of the samplers
STREAM_CONDITION_DROP = 7  # of conditions other than labels
STREAM_AUGMENT = 8  # of what is done to pictures
STREAM_DROPOUT = 9  # of a network's activations; the layer's number is in the 24 bits above
STREAM_MASK = 10  # of which tokens are left out
STREAM_PICTURE = 11  # of drawn training pictures
STREAM_CAPTION = 12  # which of a picture's captions is told, and whether none
STREAM_IMAGE_NOISE = 13  # of pictures that a network is told

MAX_SEED = 2**63 - 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_GOLDEN = 0.6180339887498949


def philox4x32(counter: Tensor, key: tuple[int | Tensor, int | Tensor]) -> Tensor:
    """Philox4x32-10 of every counter.

    `counter` is int64 [..., 4] with words in [0, 2**32); so is the result. `key` is two 32-bit words,
    numbers or 0-d int64 tensors.
    """
    c0, c1, c2, c3 = (counter & _MASK).unbind(-1)
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps around, which leaves all 64 bits of the unsigned product in place.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def key_of(seed: int) -> tuple[int, int]:
    """The two 32-bit key words of a seed in [0, 2**63). Raises ValueError outside that range."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed} is outside 0 .. 2**63 - 1; choose a seed in that range")
    return seed & _MASK, seed >> 32


def random_bits(
    seed: int,
    step: int | Tensor,
    slot_B: Tensor,
    stream: int,
    num_blocks: int,
    first_block: int = 0,
) -> Tensor:
    """The four 32-bit words of blocks `first_block .. first_block + num_blocks - 1` of every sample: int64 [B, K, 4].

    `slot_B` holds global sample slots (int64 [B]); `step` is an integer or a 0-d int64 tensor on the same device.
    """
    slot_B = torch.as_tensor(slot_B, dtype=torch.int64)
    device = slot_B.device
    shape = (slot_B.shape[0], num_blocks)
    block_K = torch.arange(first_block, first_block + num_blocks, dtype=torch.int64, device=device)
    step = torch.as_tensor(step, dtype=torch.int64, device=device)
    counter_BK4 = torch.stack(
        (
            block_K.expand(shape),
            slot_B[:, None].expand(shape),
            step.expand(shape),
            torch.full(shape, stream, dtype=torch.int64, device=device),
        ),
        dim=-1,
    )
    return philox4x32(counter_BK4, key_of(seed))


def first_words(
    seed: int,
    step: int | np.ndarray,
    slot: int | np.ndarray,
    stream: int,
    block: int | np.ndarray = 0,
) -> np.ndarray:
    """The first word of every block: uint64 below 2**32, of the common shape of step, slot and block (integers).

    The same bits as `random_bits(...)[..., 0]`, in NumPy, at a tenth of the cost for the few hundred decisions that a
    step of the data takes on the host, and for many steps in one call.
    """
    mask, half, (k0, k1) = np.uint64(_MASK), np.uint64(32), key_of(seed)
    m0, m1 = map(np.uint64, _MULTIPLIERS)
    c0, c1, c2, c3 = (
        np.asarray(each).astype(np.uint64) & mask for each in (block, slot, step, stream)
    )
    for _ in range(10):  # what is the same for all slots stays one number until it meets a slot
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            (p1 >> half) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> half) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0


def uniforms(
    seed: int,
    step: int | Tensor,
    slot_B: Tensor,
    stream: int,
    num: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Uniform numbers (word + 1/2) * 2**-32, [B, num]; in the open interval (0, 1) as float64, (0, 1] as float32."""
    bits_BK4 = random_bits(seed, step, slot_B, stream, -(-num // 4))
    return ((bits_BK4.flatten(1)[:, :num].double() + 0.5) * 2.0**-32).to(dtype)


def box_muller(bits_K4: Tensor) -> Tensor:
    """Standard normals of blocks of four words, float64 [..., 4], from int64 [..., 4].

    Words (0, 1) give elements 0 and 1, words (2, 3) give elements 2 and 3: radius sqrt(-2 ln((r + 1/2) 2**-32)), and an
    angle (pi/2)(q + f) of the quadrant q (two high bits) and of f in (-1/2, 1/2) (thirty low bits, never 0).
    """
    u = (bits_K4[..., 0::2].double() + 0.5) * 2.0**-32
    # ln u through the distance to 1 where u is large: exact subtraction, no cancellation.
    log_u = torch.where(u > 0.5, torch.log1p(-(1.0 - u)), torch.log(u))
    radius = torch.sqrt(-2.0 * log_u)
    word = bits_K4[..., 1::2]
    q = word >> 30
    f = (2 * (word & (2**30 - 1)) - 2**30 + 1).double() * 2.0**-31
    cos, sin = torch.cos(f * (math.pi / 2)), torch.sin(f * (math.pi / 2))
    # Rotating by the quadrant instead of adding it to the angle keeps small results accurate.
    even = torch.where(q % 2 == 0, cos, sin) * torch.where((q == 1) | (q == 2), -1.0, 1.0)
    odd = torch.where(q % 2 == 0, sin, cos) * torch.where(q >= 2, -1.0, 1.0)
    return torch.stack((radius * even, radius * odd), dim=-1).flatten(-2)


def normals(
    seed: int,
    step: int | Tensor,
    slot_B: Tensor,
    stream: int,
    num: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The first `num` standard normals of every sample, [B, num]; computed in float64 and rounded once to `dtype`."""
    bits_BK4 = random_bits(seed, step, slot_B, stream, -(-num // 4))
    return box_muller(bits_BK4).flatten(1)[:, :num].to(dtype)


def stratum_stride(num_slots: int) -> int:
    """The smallest stride >= round(golden ratio * num_slots) coprime with num_slots.

    Slot -> slot * stride modulo num_slots is then a permutation of the strata in which every contiguous run of slots
    (a micro-batch, a rank's share) is well spread. Raises ValueError unless num_slots >= 1.
    """
    if num_slots < 1:
        raise ValueError(
            f"num_slots={num_slots} must be at least 1: it is the size of the global batch"
        )
    stride = max(1, round(_GOLDEN * num_slots))
    while math.gcd(stride, num_slots) != 1:
        stride += 1
    return stride


def uniform_draw(
    seed: int, step: int | Tensor, slot_B: Tensor, num_slots: int, stratified: bool
) -> Tensor:
    """The integers U in [0, 2**32) by which samples choose their rows: int64 [B].

    Independent: a random word of the sample. Stratified: every one of the `num_slots` equal parts of [0, 2**32) holds
    exactly one sample of the global batch; which one is rotated at random at every step.
    """
    slot_B = torch.as_tensor(slot_B, dtype=torch.int64)
    v_B = random_bits(seed, step, slot_B, STREAM_T, 1)[:, 0, 0].contiguous()
    if not stratified:
        return v_B
    first = torch.zeros(1, dtype=torch.int64, device=slot_B.device)
    shift = random_bits(seed, step, first, STREAM_T, 1, first_block=1)[0, 0, 1] % num_slots
    stratum_B = (slot_B * stratum_stride(num_slots) + shift) % num_slots
    return ((stratum_B << 32) + v_B) // num_slots


def row_draw(
    seed: int,
    step: int | Tensor,
    slot_B: Tensor,
    cdf_T: Tensor,
    num_slots: int,
    stratified: bool,
) -> Tensor:
    """The row of the step table that every sample trains on: int64 [B].

    `cdf_T` is int64 [T], the cumulative density times 2**32, non-decreasing, with 2**32 as its last entry. The row is
    the number of entries <= U, so that row j has probability (cdf[j] - cdf[j-1]) / 2**32.
    """
    u_B = uniform_draw(seed, step, slot_B, num_slots, stratified)
    return torch.searchsorted(cdf_T.contiguous(), u_B, right=True)
