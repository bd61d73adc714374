"""Addressed random numbers inside Triton kernels: `speed_kernels.philox` on the GPU.

Words are bit-equal to the reference; normals are within a few units in the last place, by short polynomials over the
ranges that occur: no slow paths, no stack, no tables.

Shape legend: K lanes, each with a block of four elements or two; a tile is all their elements in order.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from speed_kernels import philox

STREAM_EPS = tl.constexpr(philox.STREAM_EPS)


@triton.jit
def philox4x32(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10; words and keys are uint32 scalars or tensors."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def minus_log_uniform(word):
    """-ln((word + 1/2) 2^-32): by the distance to 2^32 where that is small, so that nothing cancels."""
    above = word.to(tl.float32) + 0.5
    below = (word ^ 0xFFFFFFFF).to(tl.float32) + 0.5
    # above = 2^exponent m with m in [sqrt(1/2), sqrt(2))
    bits = above.to(tl.uint32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = (bits >> 23).to(tl.int32) - 127
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    z = tl.where(exponent == 32, below * -2.3283064365386963e-10, m - 1.0)
    p = 0.08700359612703323 * z - 0.1426747590303421
    p = p * z + 0.1491478681564331
    p = p * z - 0.165775865316391
    p = p * z + 0.19963061809539795
    p = p * z - 0.2500133812427521
    p = p * z + 0.3333390951156616
    log_m = z + (z * z) * (z * p - 0.5)
    return (32 - exponent).to(tl.float32) * 0.6931471805599453 - log_m


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals from two words."""
    radius = tl.sqrt(2.0 * minus_log_uniform(radius_word))
    # f = (2 l - 2^30 + 1) 2^-31 for the thirty low bits l
    low = (((angle_word << 2) ^ 0x80000000).to(tl.int32, bitcast=True) >> 1) | 1
    f = low.to(tl.float32) * 4.656612873077393e-10
    g = f * f
    s = -0.004601657390594482 * g + 0.07968003302812576
    s = s * g - 0.6459634900093079
    s = s * g + 1.5707963705062866
    s = s * f
    c = 0.0009037664858624339 * g - 0.02086016535758972
    c = c * g + 0.25366923213005066
    c = c * g - 1.2337005138397217
    c = c * g + 1.0
    odd_quadrant = (angle_word & 0x40000000) != 0
    even = (radius * tl.where(odd_quadrant, s, c)).to(tl.uint32, bitcast=True)
    odd = (radius * tl.where(odd_quadrant, c, s)).to(tl.uint32, bitcast=True)
    even = even ^ ((angle_word + 0x40000000) & 0x80000000)
    odd = odd ^ (angle_word & 0x80000000)
    return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)


@triton.jit
def four_normals(block_K, slot, step, stream: tl.constexpr, key0, key1):
    """The normals of blocks of four elements, each a tensor like `block_K`."""
    zero = slot ^ slot
    r0, r1, r2, r3 = philox4x32(block_K, slot, step, zero + stream, key0, key1)
    n0, n1 = box_muller(r0, r1)
    n2, n3 = box_muller(r2, r3)
    return n0, n1, n2, n3


@triton.jit
def normals_tile(first_block, slot, step, key0, key1, TILE: tl.constexpr, RUN: tl.constexpr):
    """Noise of TILE consecutive elements from block `first_block` (uint32) on.

    RUN elements, 4 or 8, stay together in a thread: as many as one 128-bit access of the tensors moves. Joining
    orders them without exchanging anything between threads.
    """
    lane_K = tl.arange(0, TILE // RUN).to(tl.uint32)
    if RUN == 4:
        n0, n1, n2, n3 = four_normals(first_block + lane_K, slot, step, STREAM_EPS, key0, key1)
        pairs = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    else:
        block_K = first_block + 2 * lane_K
        a0, a1, a2, a3 = four_normals(block_K, slot, step, STREAM_EPS, key0, key1)
        b0, b1, b2, b3 = four_normals(block_K + 1, slot, step, STREAM_EPS, key0, key1)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
        pairs = tl.join(even, odd)
    return tl.reshape(pairs, [TILE])
