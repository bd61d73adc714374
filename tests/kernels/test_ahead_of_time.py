"""Code generation of the noise and loss kernels for A100, H100/H200 and B200, on a machine that has none of them."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from speed_kernels import ahead_of_time  # noqa: E402
from speed_kernels.ahead_of_time import ARCHITECTURES, Report, report  # noqa: E402
from speed_kernels.loss import triton_gpu as loss_gpu  # noqa: E402
from speed_kernels.noise import triton_gpu as noise_gpu  # noqa: E402

pytestmark = pytest.mark.slow  # every case runs a compiler

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


@triton.jit
def scale_kernel(x_ptr, y_ptr, index_ptr, num, factor, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < num)
    first = tl.load(index_ptr).to(tl.float32)
    tl.store(y_ptr + offset, (x.to(tl.float32) * factor + first).to(tl.bfloat16), mask=offset < num)


@triton.jit
def transpose_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offset = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offset[:, None] * SIZE + offset[None, :])
    tl.store(y_ptr + offset[:, None] * SIZE + offset[None, :], tl.trans(x))


SCALE = {"x_ptr": "*bf16", "y_ptr": "*bf16", "index_ptr": "*i64", "num": "i32", "factor": "fp32"}


@every_architecture
def test_report_reads_the_machine_code(arch: int) -> None:
    found = report(scale_kernel, SCALE, {"BLOCK": 2048}, arch, divisible=["num"])
    assert (found.kernel, found.arch) == ("scale_kernel", arch)
    assert (
        8 <= found.registers <= 64 and found.spills == found.stack_bytes == found.shared_bytes == 0
    )
    assert found.loads == {64: 1, 128: 2} and found.stores == {128: 2}
    assert found.load_bits == found.store_bits == 128 and found.num_instructions > 20
    assert ".global" in found.ptx and "LDG" in found.sass


def test_report_sees_accesses_that_are_not_vectors() -> None:
    found = report(scale_kernel, SCALE, {"BLOCK": 2048}, 90)
    assert found.load_bits == 64 and found.store_bits == 16


def test_report_sees_spills_and_shared_memory() -> None:
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    roomy = report(transpose_kernel, signature, {"SIZE": 64}, 90, num_warps=1)
    tight = report(transpose_kernel, signature, {"SIZE": 64}, 90, num_warps=1, max_registers=32)
    assert roomy.shared_bytes >= 4096 and roomy.registers > 32 and roomy.spills == 0
    assert tight.registers <= 32 and tight.spills > 0 and tight.stack_bytes > 0


def test_report_names_the_argument_without_a_type() -> None:
    with pytest.raises(
        ValueError, match="give scale_kernel's arguments num, BLOCK a type or a value"
    ):
        report(scale_kernel, {k: v for k, v in SCALE.items() if k != "num"}, {}, 90)
    with pytest.raises(ValueError, match="no compiled Triton kernel"):
        report(print, {}, {}, 90)


def test_available_here() -> None:
    assert ahead_of_time.unavailable() is None


@functools.cache  # several tests look at the same code
def noise_report(
    arch: int,
    x0: str,
    x_t: str,
    fanout: int = 32,
    wide: bool = False,
    rows: str = "drawn",
) -> Report:
    signature = {
        "x0_ptr": f"*{x0}", "x_t_ptr": f"*{x_t}", "cdf_ptr": "*i64", "chosen_ptr": "*i64", "rows_ptr": "*fp32",
        "time_ptr": "*fp32", "address_ptr": "*i64", "row_out_ptr": "*i64", "time_out_ptr": "*fp32",
        "num_elements": "i64" if wide else "i32", "num_rows": "i32", "key0": "i32", "key1": "i32",
        "num_slots": "i32", "stride": "i32", "num_chunks": "i32", "num_tiles": "i32",
    }  # fmt: skip
    constexprs: dict[str, Any] = {
        "ROWS": rows, "STRATIFIED": rows == "drawn", "FANOUT": fanout if rows == "drawn" else 1, "TILE": noise_gpu.TILE,
        "RUN": 4 if x0 == x_t == "fp32" else 8, "WIDE": wide,
    }  # fmt: skip
    return report(
        noise_gpu.noise_kernel,
        signature,
        constexprs,
        arch,
        noise_gpu.NUM_WARPS,
        divisible=["num_elements"],
    )


@functools.cache  # several tests look at the same code
def loss_report(arch: int, out: str, x0: str, learned: bool, wide: bool = False) -> Report:
    signature = {
        "out_ptr": f"*{out}", "x0_ptr": f"*{x0}", "row_ptr": "*i64", "rows_ptr": "*fp32", "address_ptr": "*i64",
        "grad_ptr": f"*{out}", "partial_ptr": "*fp32", "ticket_ptr": "*i32", "total_ptr": "*fp32",
        "losses_ptr": "*fp32", "num_elements": "i64" if wide else "i32", "num_rows": "i32", "key0": "i32",
        "key1": "i32", "batch": "i32", "num_chunks": "i32", "num_tiles": "i32", "inverse_elements": "fp32",
        "vb_scale": "fp32", "grad_scale": "fp32",
    }  # fmt: skip
    constexprs: dict[str, Any] = {
        "LEARNED": learned, "WEIGHT_VB": True, "TILE": loss_gpu.TILE, "RUN": 4 if out == x0 == "fp32" else 8,
        "WIDE": wide, "CHUNKS": 8, "SAMPLES": 64,
    }  # fmt: skip
    return report(
        loss_gpu.loss_kernel,
        signature,
        constexprs,
        arch,
        loss_gpu.NUM_WARPS,
        divisible=["num_elements"],
    )


@every_architecture
@pytest.mark.parametrize("rows", ["drawn", "given"])
@pytest.mark.parametrize(("x0", "x_t"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")])
def test_noise_kernel(arch: int, x0: str, x_t: str, rows: str) -> None:
    found = noise_report(arch, x0, x_t, rows=rows)
    assert found.spills == 0 and found.stack_bytes == 0
    assert found.registers <= 40
    # Nothing is exchanged between threads: the normals are made where the elements are.
    assert found.shared_bytes == 0
    # All elements move in 128-bit accesses; only the table, the address and the drawn row are scalars.
    bytes_per_thread = noise_gpu.TILE // (32 * noise_gpu.NUM_WARPS) * (4 if x0 == "fp32" else 2)
    assert found.loads[128] == bytes_per_thread // 16
    assert found.store_bits == 128 and 16 not in found.loads and 16 not in found.stores


@every_architecture
def test_noise_kernel_without_rows(arch: int) -> None:
    """The low words of step and slot are read, and nothing else; the noise is written."""
    found = noise_report(arch, "fp32", "fp32", rows="none")
    assert found.spills == found.stack_bytes == found.shared_bytes == 0
    assert found.registers <= 40
    assert found.loads == {32: 2}
    assert found.stores == {128: noise_gpu.TILE // (32 * noise_gpu.NUM_WARPS) // 4}


@every_architecture
@pytest.mark.parametrize(
    ("out", "x0", "learned"),
    [("fp32", "fp32", True), ("bf16", "fp32", True), ("bf16", "bf16", False)],
)
def test_loss_kernel(arch: int, out: str, x0: str, learned: bool) -> None:
    found = loss_report(arch, out, x0, learned)
    assert found.spills == 0 and found.stack_bytes == 0
    assert found.registers <= (72 if learned else 40)
    # The last program's sum alone; the tiles exchange nothing between threads.
    assert found.shared_bytes <= 4 * loss_gpu.LAST_TILE
    assert found.load_bits >= 128 and found.store_bits >= 128
    assert 16 not in found.loads and 16 not in found.stores


def test_variants_for_large_tables_and_samples() -> None:
    for found in (
        noise_report(90, "bf16", "bf16", fanout=128),
        noise_report(90, "bf16", "bf16", wide=True),
        noise_report(90, "bf16", "bf16", wide=True, rows="given"),
        loss_report(90, "bf16", "bf16", True, wide=True),
    ):
        assert found.spills == 0 and found.load_bits == 128 and found.store_bits == 128


def test_counters_are_64_bits_wide_before_they_are_multiplied() -> None:
    """The offset of a sample is a 64-bit product, so that a batch may have more than 2^31 elements."""
    for found in (noise_report(90, "bf16", "bf16"), loss_report(90, "bf16", "bf16", True)):
        assert "mul.lo.s64" in found.ptx or "mad.lo.s64" in found.ptx or "mul.wide.s32" in found.ptx


def test_a_barrier_and_memory_order_at_the_ticket() -> None:
    """Partial results are stored, then a barrier, then a ticket with acquire and release; then past the first cache."""
    parts = loss_report(90, "bf16", "bf16", True).ptx.split("atom.")
    assert len(parts) == 2, "one ticket a program"
    before, after = parts
    assert after.startswith("global.gpu.acq_rel")
    assert "bar.sync" in before.rsplit("st.global", 1)[1]
    assert "ld.global.cg" in after
