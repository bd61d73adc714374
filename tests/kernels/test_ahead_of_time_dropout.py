"""Code generation of the dropout kernel for A100, H100/H200 and B200, on a machine that has none of them."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted, not compiled", allow_module_level=True)

from speed_kernels.ahead_of_time import ARCHITECTURES, report  # noqa: E402
from speed_kernels.dropout import triton_gpu  # noqa: E402

pytestmark = pytest.mark.slow  # every case runs a compiler


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "run"), [("fp32", 4), ("bf16", 8)])
def test_kernel(arch: int, dtype: str, run: int) -> None:
    pointers = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "address_ptr": "*i64"}
    numbers = dict.fromkeys(("num_elements", "layer", "threshold"), "i32")
    found = report(
        triton_gpu.dropout_kernel,
        pointers | numbers | {"scale": "fp32", "num_chunks": "i32", "num_tiles": "i32"},
        {"TILE": triton_gpu.TILE, "RUN": run, "WIDE": False},
        arch,
        triton_gpu.NUM_WARPS,
        divisible=("num_elements",),
    )
    assert found.spills == found.stack_bytes == found.shared_bytes == 0
    assert found.registers <= 48
    # The three numbers of the address, and x in 128-bit accesses.
    num = triton_gpu.TILE // (32 * triton_gpu.NUM_WARPS * run)
    assert found.loads[128] == found.stores[128] == num and set(found.stores) == {128}
