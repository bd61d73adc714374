"""Code generation of the group norm kernels for A100, H100/H200 and B200, on a machine that has none of them."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

import torch  # noqa: E402
from speed_kernels.ahead_of_time import ARCHITECTURES, Report, report  # noqa: E402
from speed_kernels.group_norm_silu import triton_gpu, triton_kernels  # noqa: E402

pytestmark = pytest.mark.slow  # every case runs a compiler

CASES = [(arch, "bf16") for arch in ARCHITECTURES] + [(90, "fp32")]
every_case = pytest.mark.parametrize(("arch", "dtype"), CASES)
BYTES = {"fp32": 4, "bf16": 2}
IMAGES = ("x_ptr", "d_y_ptr", "y_ptr", "d_x_ptr")
OPERANDS = ("weight_ptr", "bias_ptr", "d_weight_ptr", "d_bias_ptr")


def compiled(
    kernel: Any, arch: int, dtype: str, channels: int = 320, operand: str | None = None
) -> Report:
    """A kernel for images of `dtype`, with weight and bias of `operand` or the same."""
    columns = triton_gpu.tile_columns(channels)
    sums = kernel is triton_kernels.channel_sum_kernel
    constants = {
        "SILU": True,
        "ROWS": triton_gpu.TILE // columns,
        "COLUMNS": triton_gpu.SUM_COLUMNS if sums else columns,
        "BLOCK": triton_gpu.PARTS,
        "PARTS": triton_gpu.SUM_PARTS,
    }
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            pointee = (
                dtype if name in IMAGES else (operand or dtype) if name in OPERANDS else "fp32"
            )
            signature[name] = f"*{pointee}"
        elif name not in constants:
            signature[name] = "fp32" if name in ("eps", "inverse_total") else "i32"
    return report(
        kernel,
        signature,
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        arch,
        triton_gpu.NUM_WARPS,
        divisible=() if channels % 16 else ("num_channels",),
    )


def accesses(dtype: str) -> int:
    """128-bit accesses with which a thread moves its part of a tile, or of an operand: 8 elements."""
    return triton_gpu.TILE // (32 * triton_gpu.NUM_WARPS) * BYTES[dtype] // 16


@every_case
@pytest.mark.parametrize(
    ("kernel", "images", "operands", "pairs", "registers"),
    [
        (triton_kernels.apply_kernel, 1, 2, 1, 48),
        (triton_kernels.apply_backward_kernel, 2, 2, 2, 96),
        (triton_kernels.reduce_kernel, 2, 2, 1, 96),
        (triton_kernels.statistics_kernel, 1, 0, 0, 64),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_passes_over_images(
    arch: int, dtype: str, kernel: Any, images: int, operands: int, pairs: int, registers: int
) -> None:
    found = compiled(kernel, arch, dtype)
    assert found.spills == found.stack_bytes == 0
    assert found.registers <= registers
    assert found.shared_bytes <= 1024
    # All that is read, the values of channels included, comes in 128-bit accesses. A thread's part of a row is one
    # access wide; channels have two float32 in a pair.
    share = 16 // BYTES[dtype]
    per_operand, per_pair = 1, 2 * share * 4 // 16
    expected = images * accesses(dtype) + operands * per_operand + pairs * per_pair
    assert found.loads == {128: expected}
    if kernel in (triton_kernels.apply_kernel, triton_kernels.apply_backward_kernel):
        assert found.stores == {128: accesses(dtype)} and found.shared_bytes == 0
    else:
        assert found.stores == {32: 2}  # the sums of a channel, from a thread for each


@every_case
@pytest.mark.parametrize(
    "kernel",
    [
        triton_kernels.group_kernel,
        triton_kernels.group_means_kernel,
        triton_kernels.channel_sum_kernel,
    ],
    ids=lambda value: value.__name__,
)
def test_small_kernels(arch: int, dtype: str, kernel: Any) -> None:
    found = compiled(kernel, arch, dtype)
    assert found.spills == found.stack_bytes == 0 and found.registers <= 80


@pytest.mark.parametrize("channels", [48, 100, 1536])
def test_other_widths(channels: int) -> None:
    for kernel in (triton_kernels.reduce_kernel, triton_kernels.apply_backward_kernel):
        found = compiled(kernel, 90, "bf16", channels, operand="fp32")
        assert found.spills == found.stack_bytes == 0 and found.registers <= 168
        assert channels % 16 or found.load_bits == 128


def test_samples_are_64_bits_wide_before_they_are_multiplied() -> None:
    """So that a batch may have more than 2^31 elements."""
    for kernel in (triton_kernels.apply_kernel, triton_kernels.reduce_kernel):
        ptx = compiled(kernel, 90, "bf16").ptx
        assert "mul.lo.s64" in ptx or "mad.lo.s64" in ptx or "mul.wide.s32" in ptx


@pytest.mark.parametrize("channels", [64, 128, 256, 320, 512, 640, 960, 1280, 1920, 2560])
def test_a_u_net_s_widths_leave_no_lane_idle(channels: int) -> None:
    columns = triton_gpu.tile_columns(channels)
    assert channels % columns == 0 and columns * 2 >= 64  # bytes of a row: whole sectors


@pytest.mark.parametrize(
    ("shape", "programs"), [((32, 320, 64, 64), 4096), ((32, 1280, 8, 8), 512)]
)
def test_sums_fill_the_gpu_and_are_few(shape: tuple[int, ...], programs: int) -> None:
    cut = triton_gpu.Cut.of(torch.empty(shape, device="meta"))
    num_runs = cut.num_runs(cut.sum_tiles)
    assert cut.num_samples * num_runs * cut.num_blocks >= programs
    assert num_runs * 2 * 4 <= cut.num_rows * 2 / 4  # bytes of sums, and of bfloat16 in a channel
