"""The noise op as one Triton kernel on CUDA GPUs (A100, H100, H200, B200), and the generator that the loss shares.

A program handles a run of one sample's elements. It draws the sample's row itself (two dependent loads), makes four
normals per Philox call in the order in which its threads hold consecutive elements, and moves 128 bits per thread and
access. Nothing is read on the host: step and slot come from `address_2`, so a launch can be captured in a CUDA graph.

Shape legend: K lanes of a program, E elements of a tile, F fan-out of the row search.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnbound=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from speed_kernels import philox
from torch import Tensor

TILE = 1024  # elements that a program handles at a time
NUM_WARPS = 4
STREAM_T = tl.constexpr(philox.STREAM_T)
STREAM_EPS = tl.constexpr(philox.STREAM_EPS)
TWO_32 = tl.constexpr(2**32)


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}; 8.0 (A100) or newer is needed"
    return None


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
    rows_ptr,
    tau_ptr,
    address_ptr,
    row_out_ptr,
    tau_out_ptr,
    num_elements,
    num_rows,
    key0,
    key1,
    num_slots,
    stride,
    num_chunks,
    num_tiles,
    STRATIFIED: tl.constexpr,
    FANOUT: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program b * num_chunks + chunk: `num_tiles` tiles of sample b. WIDE: a sample has 2^31 elements or more."""
    chunk = tl.program_id(0) % num_chunks
    b = (tl.program_id(0) // num_chunks).to(tl.int64)
    key0 = key0.to(tl.uint32, bitcast=True)
    key1 = key1.to(tl.uint32, bitcast=True)
    step = tl.load(address_ptr).to(tl.uint32)
    slot = tl.load(address_ptr + 1) + b
    row = draw_row(cdf_ptr, num_rows, slot, step, key0, key1, num_slots, stride, STRATIFIED, FANOUT)
    if chunk == 0:
        tl.store(row_out_ptr + b, row.to(tl.int64))
        tl.store(tau_out_ptr + b, tl.load(tau_ptr + row))
    scale = tl.load(rows_ptr + row * 8)
    sigma = tl.load(rows_ptr + row * 8 + 1)

    first_tile = chunk * num_tiles
    if WIDE:
        first_tile = first_tile.to(tl.int64)
    sample = b * num_elements
    for tile in range(num_tiles):
        start = (first_tile + tile) * TILE
        offset_E = start + tl.arange(0, TILE)
        mask_E = offset_E < num_elements
        x0_E = tl.load(x0_ptr + sample + offset_E, mask=mask_E, other=0.0).to(tl.float32)
        first_block = (start // 4).to(tl.uint32)
        eps_E = normals_tile(first_block, slot.to(tl.uint32), step, key0, key1, TILE, RUN)
        x_t_E = scale * x0_E + sigma * eps_E
        tl.store(x_t_ptr + sample + offset_E, x_t_E.to(x_t_ptr.dtype.element_ty), mask=mask_E)


def signed_word(word: int) -> int:
    """A 32-bit word as the signed integer of the same bits: kernels take words as int32."""
    return word - 2**32 if word >= 2**31 else word


def fanout(num_rows: int) -> int:
    """Fan-out of the two-level row search."""
    size = 16
    while size * size < num_rows:
        size *= 2
    return size


def tiles_per_program(batch: int, num_elements: int, device: torch.device) -> int:
    """How many tiles a program takes in turn: more once there are enough programs to fill the GPU four times over."""
    tiles = batch * -(-num_elements // TILE)
    num_processors = 1
    if device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    per_program = 1
    while per_program < 8 and tiles > 2 * per_program * 64 * num_processors:
        per_program *= 2
    return per_program


def run_length(*tensors: Tensor) -> int:
    """Consecutive elements per thread: a 128-bit access of the narrowest tensor."""
    return 16 // min(tensor.element_size() for tensor in tensors)


def noise(
    x0: Tensor,
    cdf_T: Tensor,
    rows_T8: Tensor,
    tau_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.noise.op`. One launch."""
    x0, cdf_T, rows_T8, tau_T, address_2 = (
        tensor.contiguous() for tensor in (x0, cdf_T, rows_T8, tau_T, address_2)
    )
    batch, num_rows = x0.shape[0], rows_T8.shape[0]
    x_t = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    row_B = torch.empty(batch, dtype=torch.int64, device=x0.device)
    tau_B = torch.empty(batch, dtype=torch.float32, device=x0.device)
    if batch == 0:
        return x_t, row_B, tau_B
    num_elements = x0.numel() // batch
    num_tiles = tiles_per_program(batch, num_elements, x0.device)
    key0, key1 = philox.key_of(seed)
    # A sample without elements still draws its row.
    num_chunks = max(1, triton.cdiv(num_elements, num_tiles * TILE))
    with torch.cuda.device_of(x0):
        noise_kernel[(batch * num_chunks,)](
            x0,
            x_t,
            cdf_T,
            rows_T8,
            tau_T,
            address_2,
            row_B,
            tau_B,
            num_elements,
            num_rows,
            signed_word(key0),
            signed_word(key1),
            num_slots,
            philox.stratum_stride(num_slots),
            num_chunks,
            num_tiles,
            STRATIFIED=stratified,
            FANOUT=fanout(num_rows),
            TILE=TILE,
            RUN=run_length(x0, x_t),
            WIDE=num_elements >= 2**31 - 8 * TILE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return x_t, row_B, tau_B
