"""Code generation of the optimizer's kernels for A100, H100/H200 and B200, on a machine that has none of them."""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

from speed_kernels.adamw_ema import triton_flat, triton_list  # noqa: E402
from speed_kernels.ahead_of_time import ARCHITECTURES, Report, report  # noqa: E402

pytestmark = pytest.mark.slow  # every case runs a compiler

FLOATS = dict.fromkeys(("p_ptr", "m_ptr", "v_ptr", "e1_ptr", "e2_ptr", "scalars_ptr"), "*fp32")
GRADS = [("*fp32", "i64"), ("*bf16", "i32")]  # types of the gradient and of sizes

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
every_gradient = pytest.mark.parametrize(("grad", "size"), GRADS)


def compiled(
    kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], arch: int
) -> Report:
    found = report(
        kernel,
        signature,
        {**constexprs, "BLOCK": triton_flat.BLOCK},
        arch,
        num_warps=triton_flat.NUM_WARPS,
    )
    assert (found.spills, found.stack_bytes) == (0, 0)
    return found


@every_architecture
@every_gradient
def test_a_flat_buffer_of_any_length_is_moved_by_128_bits(arch: int, grad: str, size: str) -> None:
    """ZeRO cuts a flat buffer where it likes: no length is known to be a multiple of anything."""
    signature = {**FLOATS, "g_ptr": grad, "copy_ptr": "*bf16", "N": size}
    found = compiled(triton_flat.update_kernel, signature, {"SECOND": True, "COPY": True}, arch)
    # Of the eight elements of a thread: gradient and five fp32 tensors, then those and the bf16 copy.
    assert found.loads[128] == (2 if grad == "*fp32" else 1) + 5 * 2
    assert found.stores[128] == 5 * 2 + 1
    assert found.registers <= 64
    found = compiled(
        triton_flat.square_kernel, {"g_ptr": grad, "partial_ptr": "*fp64", "N": size}, {}, arch
    )
    assert found.loads[128] >= (2 if grad == "*fp32" else 1)


@every_architecture
@every_gradient
def test_a_list_is_moved_by_128_bits(arch: int, grad: str, size: str) -> None:
    signature = {"table_ptr": "*i64", "float_ptr": "*fp32", "grad_ptr": grad, "copy_ptr": "*bf16"}
    signature |= {"scalars_ptr": "*fp32", "L": "i32"}
    constants = {"SECOND": True, "COPY": True, "ALIGNED": True}
    found = compiled(triton_list.update_list_kernel, signature, constants, arch)
    assert found.loads[128] == (2 if grad == "*fp32" else 1) + 5 * 2
    assert found.stores[128] == 5 * 2 + 1
    assert found.registers <= 64
    signature = {"table_ptr": "*i64", "grad_ptr": grad, "partial_ptr": "*fp64", "L": "i32"}
    signature |= {"num_blocks": "i32"}
    found = compiled(triton_list.square_list_kernel, signature, {"ALIGNED": True}, arch)
    assert found.loads[128] >= (2 if grad == "*fp32" else 1) and found.registers <= 64


@every_architecture
def test_the_scalars(arch: int) -> None:
    kernel = triton_flat.prepare_kernel
    signature = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    constants = {"SKIPPED": True, "SQUARE_SUM": True, "GRAD_SCALE": True}
    found = report(kernel, signature, constants, arch, num_warps=1)
    assert (found.spills, found.stack_bytes) == (0, 0)
