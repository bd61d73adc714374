"""Code generation of the bias_gelu kernels for A100, H100/H200 and B200, on a machine that has none of them."""

from __future__ import annotations

import functools
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

from speed_kernels.ahead_of_time import ARCHITECTURES, Report, report  # noqa: E402
from speed_kernels.bias_gelu import triton_gpu  # noqa: E402

pytestmark = pytest.mark.slow  # every case runs a compiler

WIDTHS = (1536, 3072, 4096, 4608)
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
CASES = [(arch, dtype) for arch in ARCHITECTURES for dtype in ("fp32", "bf16")] + [(90, "fp16")]
every_case = pytest.mark.parametrize(("arch", "dtype"), CASES)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@functools.cache  # several tests look at the same code
def forward(arch: int, dtype: str, width: int = 4608, bias: bool = True) -> Report:
    rows, columns = triton_gpu.tile_shape(triton_gpu.FORWARD_TILE, width)
    names = ("x_ptr", "bias_ptr", "y_ptr")
    pointers: dict[str, str] = dict.fromkeys(names, f"*{dtype}")
    numbers: dict[str, str] = dict.fromkeys(("num_rows", "num_columns", "num_blocks"), "i32")
    return report(
        triton_gpu.forward_kernel,
        pointers | numbers,
        {"BIAS": bias, "ROWS": rows, "COLUMNS": columns},
        arch,
        triton_gpu.NUM_WARPS,
        divisible=() if width % 16 else ("num_columns",),
    )


@functools.cache  # several tests look at the same code
def backward(arch: int, dtype: str, width: int = 4608, bias: bool = True) -> Report:
    rows, columns = triton_gpu.tile_shape(triton_gpu.BACKWARD_TILE, width)
    names = ("d_y_ptr", "x_ptr", "bias_ptr", "d_x_ptr")
    pointers = dict.fromkeys(names, f"*{dtype}") | {"partial_ptr": "*fp32"}
    numbers = dict.fromkeys(("num_rows", "num_columns", "num_blocks", "num_tiles"), "i32")
    return report(
        triton_gpu.backward_kernel,
        pointers | numbers,
        {"BIAS": bias, "ROWS": rows, "COLUMNS": columns},
        arch,
        triton_gpu.NUM_WARPS,
        divisible=() if width % 16 else ("num_columns",),
    )


def accesses(tile: int, dtype: str) -> int:
    """128-bit accesses with which a thread moves its part of one tile."""
    return tile // (32 * triton_gpu.NUM_WARPS) * BYTES[dtype] // 16


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "tile", [triton_gpu.FORWARD_TILE, triton_gpu.BACKWARD_TILE], ids=["forward", "backward"]
)
def test_transformers_widths_leave_no_lane_idle(tile: int, width: int) -> None:
    rows, columns = triton_gpu.tile_shape(tile, width)
    assert width % columns == 0 and rows * columns == tile


@every_case
def test_forward_kernel(arch: int, dtype: str) -> None:
    found = forward(arch, dtype)
    assert found.spills == found.stack_bytes == 0
    assert found.registers <= 40
    # x in 128-bit accesses; the bias comes in one access as wide as a thread's share of it.
    num = accesses(triton_gpu.FORWARD_TILE, dtype)
    assert found.loads == ({128: num + 1} if dtype == "fp32" else {64: 1, 128: num})
    assert found.stores == {128: num}
    # More than about 27 instructions an element would keep an H200 from its memory's speed.
    assert found.num_instructions <= 24 * triton_gpu.FORWARD_TILE // (32 * triton_gpu.NUM_WARPS)


@every_case
def test_backward_kernel(arch: int, dtype: str) -> None:
    found = backward(arch, dtype)
    assert found.spills == found.stack_bytes == 0
    assert found.registers <= 72
    num = accesses(triton_gpu.BACKWARD_TILE, dtype)
    assert found.loads == ({128: 2 * num + 1} if dtype == "fp32" else {64: 1, 128: 2 * num})
    # The column sums are one more store.
    assert found.stores == {128: num + 1}


@pytest.mark.parametrize("width", [16, 33, 513, 4607])
def test_other_widths(width: int) -> None:
    for found in (forward(90, "bf16", width), backward(90, "bf16", width)):
        assert found.spills == found.stack_bytes == 0
        assert found.registers <= 168
        assert width % 16 or found.load_bits == found.store_bits == 128


def test_without_a_bias() -> None:
    for found in (forward(90, "bf16", bias=False), backward(90, "bf16", bias=False)):
        assert found.spills == found.stack_bytes == found.shared_bytes == 0
        assert set(found.loads) == set(found.stores) == {128}


@every_architecture
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_column_sum_kernel(arch: int, dtype: str) -> None:
    found = report(
        triton_gpu.column_sum_kernel,
        {
            "partial_ptr": "*fp32",
            "sum_ptr": f"*{dtype}",
            "num_runs": "i32",
            "num_columns": "i32",
        },
        {"RUNS": triton_gpu.SUM_RUNS, "COLUMNS": triton_gpu.SUM_COLUMNS},
        arch,
        triton_gpu.NUM_WARPS,
        divisible=("num_columns",),
    )
    assert found.spills == found.stack_bytes == 0
    assert found.registers <= 64 and found.loads == {128: 4}


def test_rows_are_64_bits_wide_before_they_are_multiplied() -> None:
    """So that a tensor may have more than 2^31 elements."""
    for found in (forward(90, "bf16"), backward(90, "bf16")):
        assert "mul.lo.s64" in found.ptx or "mad.lo.s64" in found.ptx or "mul.wide.s32" in found.ptx


def test_the_backward_pass_fills_the_gpu_and_its_sums_are_few() -> None:
    """8192 rows of 4608: ten programs for every processor of an H200, and sums of a fiftieth of the traffic."""
    rows, columns = triton_gpu.tile_shape(triton_gpu.BACKWARD_TILE, 4608)
    num_blocks, num_row_tiles = 4608 // columns, 8192 // rows
    num_tiles = triton_gpu.tiles_per_run(num_row_tiles, num_blocks)
    num_runs = -(-num_row_tiles // num_tiles)
    assert 10 * 132 <= num_runs * num_blocks <= 1.1 * triton_gpu.PROGRAMS
    assert num_runs * 4608 * 4 <= 8192 * 4608 * 3 * 2 / 50
