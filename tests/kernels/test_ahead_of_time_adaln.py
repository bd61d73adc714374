"""Code generation of the gated norm's kernels for A100, H100/H200 and B200, on a machine that has none of them, and how
their work is cut into programs."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

from speed_kernels.ahead_of_time import ARCHITECTURES, Report, report  # noqa: E402
from speed_kernels.gate_residual_norm_modulate import triton_gpu  # noqa: E402
from speed_kernels.gate_residual_norm_modulate.triton_backward import (  # noqa: E402
    backward_kernel,
    finish_kernel,
)
from speed_kernels.gate_residual_norm_modulate.triton_forward import forward_kernel  # noqa: E402

pytestmark = pytest.mark.slow  # every case runs a compiler

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what a program may have
WIDTHS = [384, 768, 1024, 1152]  # DiT-S, B, L and XL
COUNTERS = {"num_tokens": "i32", "num_chunks": "i32"}

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def pointers(names: str, element: str) -> dict[str, str]:
    return {f"{name}_ptr": f"*{element}" for name in names.split()}


def compiled(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    arch: int,
    absent: str,
    num_warps: int = triton_gpu.NUM_WARPS,
) -> Report:
    """`absent` names the pointers that are None in this call."""
    constexprs = constexprs | {f"{name}_ptr": None for name in absent.split()}
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    strides = [name for name in signature if name.endswith("_stride")]
    return report(kernel, signature, constexprs, arch, num_warps, divisible=strides)


@functools.cache  # several tests look at the same code
def forward_report(
    arch: int, width: int, stream: str, compute: str, gated: bool = True, biased: bool = True,
    quantised: bool = False,
) -> Report:  # fmt: skip
    signature = pointers("x sum", stream) | pointers("mean rstd row_scale", "fp32")
    signature |= pointers("e4m3", "fp8e4nv")
    signature |= pointers("branch gate bias shift scale y", compute)
    signature |= {"gate_stride": "i32", "shift_stride": "i32", "scale_stride": "i32", "eps": "fp32"}
    vector = triton_gpu.vector(BYTES[stream], BYTES[compute])
    constexprs = triton_gpu.forward_constants(width, vector) | {"GATED": gated, "BIASED": biased}
    constexprs |= {"QUANTISED": quantised}
    absent = ("" if gated else "branch gate sum ") + ("" if biased else "bias ")
    absent += "" if quantised else "e4m3 row_scale"
    return compiled(forward_kernel, signature | COUNTERS, constexprs, arch, absent)


@functools.cache  # several tests look at the same code
def backward_report(
    arch: int, width: int, stream: str, compute: str, num_sums: int = 4, has_d_sum: bool = True,
    shared_bytes: int | None = None,
) -> Report:  # fmt: skip
    signature = pointers("d_sum stream d_x", stream) | pointers("mean rstd partial", "fp32")
    signature |= pointers("d_y branch gate scale d_branch", compute)
    signature |= {"gate_stride": "i32", "scale_stride": "i32", "chunk_rows": "i32"}
    vector = triton_gpu.vector(BYTES[stream], BYTES[compute])
    waiting = BYTES[stream] * (1 + has_d_sum) + BYTES[compute] * (1 + (num_sums > 2))
    constexprs: dict[str, Any] = triton_gpu.backward_constants(
        width, vector, waiting, shared_bytes or SHARED[arch]
    )
    constexprs = constexprs | {"NUM_SUMS": num_sums, "HAS_D_SUM": has_d_sum}
    absent = ("" if has_d_sum else "d_sum ") + ("" if num_sums > 2 else "branch gate d_branch")
    return compiled(backward_kernel, signature | COUNTERS, constexprs, arch, absent)


@functools.cache  # several tests look at the same code
def finish_report(arch: int, compute: str, num_sums: int = 4) -> Report:
    signature = pointers("gate bias d_gate d_shift d_scale d_bias", compute)
    signature |= pointers("partial", "fp32")
    signature |= {"gate_stride": "i32", "batch": "i32", "num_chunks": "i32"}
    constexprs = {"D": 1152, "NUM_SUMS": num_sums, **triton_gpu.FINISH}
    absent = ("" if num_sums > 2 else "gate d_gate ") + ("" if num_sums > 3 else "bias d_bias")
    return compiled(finish_kernel, signature, constexprs, arch, absent, num_warps=4)


def bits(accesses: Mapping[int, int]) -> int:
    return sum(width * count for width, count in accesses.items())


def copies(found: Report) -> Counter[int]:
    """Width in bits -> copies from global to shared memory that no register waits for."""
    suffixes = re.findall(r"\bLDGSTS([A-Z0-9_.]*)", found.sass)
    widths = [re.search(r"\.(64|128)\b", suffix) for suffix in suffixes]
    return Counter(int(width[1]) if width else 32 for width in widths)


def assert_no_spills(found: Report) -> None:
    assert found.spills == 0 and found.stack_bytes == 0, found


@every_architecture
@pytest.mark.parametrize("width", WIDTHS)
def test_forward_kernel(arch: int, width: int) -> None:
    """float32 stream, bfloat16 products: 128 bits of the stream and 64 of the others per access."""
    found = forward_report(arch, width, "fp32", "bf16")
    assert_no_spills(found)
    assert found.registers <= 72
    # Rows are never exchanged between threads; only mean and rstd are, on their way out.
    assert found.shared_bytes <= 64 and found.sass.count("SHFL") <= 20
    # A warp's row: x; branch, bias, gate, scale and shift. Nothing is read or written twice, no lane is wasted.
    per_thread = width // 32
    assert dict(found.loads) == {128: per_thread // 4, 64: 5 * per_thread // 4}
    assert dict(found.stores) == {128: per_thread // 4, 64: per_thread // 4, 32: 2}


def test_forward_kernel_in_one_type() -> None:
    """128-bit accesses, but for the 128 channels of 1152 that are left when all lanes have had 32 of them."""
    found = forward_report(90, 1152, "bf16", "bf16")
    assert_no_spills(found)
    assert found.registers <= 80 and found.shared_bytes <= 64
    assert found.sass.count("BAR.SYNC") <= 3  # no row is spread over warps
    assert dict(found.loads) == {128: 6 * 4, 64: 6} and dict(found.stores) == {128: 8, 64: 2, 32: 2}


@pytest.mark.parametrize("width", WIDTHS)
def test_forward_kernel_with_rows_in_e4m3(width: int) -> None:
    """A byte an element more, and a number a row; the row stays in its warp's registers."""
    plain, found = (forward_report(90, width, "fp32", "bf16", quantised=q) for q in (False, True))
    assert_no_spills(found)
    assert found.registers <= 72 and found.shared_bytes <= 64
    assert found.loads == plain.loads and found.sass.count("SHFL") <= 25  # five more: one maximum
    assert bits(found.stores) == bits(plain.stores) + width // 32 * 8 + 32
    assert (
        "e4m3x2" in found.ptx and "div.full" not in found.ptx
    )  # hardware rounds, no division does


def test_e4m3_needs_a_newer_gpu_than_an_a100() -> None:
    """Which the launch says in a sentence (`speed_kernels.e4m3.unavailable`)."""
    with pytest.raises(Exception, match="fp8e4nv not supported"):
        forward_report(80, 384, "bf16", "bf16", quantised=True)


@every_architecture
@pytest.mark.parametrize("width", WIDTHS)
def test_backward_kernel(arch: int, width: int) -> None:
    found = backward_report(arch, width, "fp32", "bf16")
    assert_no_spills(found)
    assert found.shared_bytes <= SHARED[arch]
    # Rows are copied to shared memory once: two sets of them before the loop and one within it. The stream and its
    # gradient by 128 bits, the others by 64; half of that for what is left of 1152. Then mean and rstd.
    constants = triton_gpu.backward_constants(width, 4, 12, SHARED[arch])
    lanes, moved = constants["LANES"], copies(found)
    assert moved[128] >= 3 * 2 * constants["MAIN"] // lanes // 4
    assert moved[64] >= 3 * 2 * constants["MAIN"] // lanes // 4
    assert 0 <= bits(moved) - 3 * 8 * 12 * width // lanes <= 3 * 4 * 32
    assert found.store_bits == 128


@every_architecture
def test_backward_kernel_in_one_type(arch: int) -> None:
    found = backward_report(arch, 1152, "bf16", "bf16")
    assert_no_spills(found)
    # Two vectors of eight of each of four tensors; and what is left of 1152 in pairs, with mean and rstd.
    wide = copies(found)
    assert wide[128] == 3 * 4 * 2 and wide[64] == 0 and wide[32] <= 3 * (4 + 4)
    assert found.store_bits == 128


def test_backward_kernel_in_float32() -> None:
    """What waits in shared memory is as much as an A100 allows."""
    found = backward_report(80, 1152, "fp32", "fp32")
    assert_no_spills(found)
    assert copies(found)[128] == 3 * 4 * 4 and 128 * 1024 < found.shared_bytes <= SHARED[80]


def test_variants() -> None:
    """Without a branch, a bias, a gradient of the sum; for a GPU with little shared memory."""
    reports = [
        forward_report(90, 1152, "bf16", "bf16", gated=False, biased=False),
        backward_report(90, 1152, "bf16", "bf16", num_sums=2, has_d_sum=False),
        backward_report(90, 1152, "fp32", "bf16", num_sums=4, has_d_sum=False),
    ]
    for found in reports:
        assert_no_spills(found)
    assert_no_spills(finish_report(90, "bf16", num_sums=2))
    small = backward_report(80, 1152, "fp32", "bf16", shared_bytes=99 * 1024)
    assert small.shared_bytes < 99 * 1024 and not copies(small)
    assert_no_spills(backward_report(90, 100, "fp32", "fp16", num_sums=3))


@every_architecture
def test_finishing_kernel(arch: int) -> None:
    found = finish_report(arch, "bf16")
    assert_no_spills(found)
    assert found.registers <= 64 and found.load_bits == 128


def test_rows_are_counted_in_64_bits() -> None:
    """The offset of a row is a 64-bit product, so that a tensor may have more than 2^31 elements."""
    for found in (
        forward_report(90, 1152, "fp32", "bf16"),
        backward_report(90, 1152, "fp32", "bf16"),
        finish_report(90, "bf16"),
    ):
        assert re.search(r"(mul|mad)\.lo\.s64", found.ptx) or "mul.wide.s32" in found.ptx


@pytest.mark.parametrize("processors", [108, 132, 148])
@pytest.mark.parametrize("batch", [1, 3, 8, 32, 100, 256, 1000])
@pytest.mark.parametrize("tokens", [1, 7, 256, 1024, 100_003])
def test_chunks_cover_all_tokens(processors: int, batch: int, tokens: int) -> None:
    num_chunks, chunk_rows = triton_gpu.chunks(batch, tokens, 1152, 4, processors)
    assert chunk_rows % 4 == 0
    assert (num_chunks - 1) * chunk_rows < tokens <= num_chunks * chunk_rows
    # Programs are few enough to be worth their start, unless the batch alone has more.
    assert num_chunks == 1 or batch * num_chunks < 5 * processors + batch
    assert chunk_rows * 1152 < 2**31


def test_chunks_of_a_training_step() -> None:
    """XL/2, 32 samples on an H200: one wave of 128 programs on 132 processors; partial sums are little traffic."""
    num_chunks, chunk_rows = triton_gpu.chunks(32, 256, 1152, 4, 132)
    assert (num_chunks, chunk_rows) == (4, 64)
    written = 32 * num_chunks * 4 * 1152 * 4
    assert written < 0.03 * 32 * 256 * 1152 * 12
    assert triton_gpu.chunks(256, 256, 1152, 4, 132) == (1, 256)
    # On an A100 four chunks would leave a second wave of twenty programs.
    assert triton_gpu.chunks(32, 256, 1152, 4, 108) == (3, 88)


def test_long_sequences_are_cut_below_the_range_of_32_bits() -> None:
    num_chunks, chunk_rows = triton_gpu.chunks(1000, 3_000_000, 1152, 4, 132)
    assert num_chunks >= 3 and chunk_rows * 1152 < 2**31
