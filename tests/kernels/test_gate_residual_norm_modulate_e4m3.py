"""The gated norm's rows in e4m3: those of quantising its y afterwards, and nothing else changes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from speed_kernels.e4m3 import quantise
from speed_kernels.gate_residual_norm_modulate import cpp_cpu, op
from speed_kernels.gate_residual_norm_modulate.op_e4m3 import (
    gate_residual_norm_modulate_e4m3,
    gate_residual_norm_modulate_e4m3_op,
    norm_modulate_e4m3,
    norm_modulate_e4m3_op,
)
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [  # shape, stream, compute; widths that are no power of two leave lanes without a channel
    ((2, 5, 36), FP32, FP32),
    ((3, 7, 1), BF16, BF16),
    ((2, 9, 128), BF16, BF16),
    ((1, 3, 388), FP32, BF16),
    ((2, 2, 1028), FP32, FP16),
    ((0, 4, 12), FP32, BF16),
    ((2, 0, 12), BF16, BF16),
]

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
every_case = pytest.mark.parametrize(
    ("shape", "stream", "compute"), CASES[1:4:2] + CASES[-1:] if INTERPRETING else CASES
)


@pytest.fixture(autouse=True)
def e4m3_as_the_hardware_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (as of 3.9) rounds halves up and loses what it carries into the exponent."""
    if not INTERPRETING:
        return
    from triton import language  # pyright: ignore[reportMissingImports]
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    convert = interpreter._convert_float

    def rounding(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (language.float32, language.float8e4nv):
            return convert(values, source, target, mode)
        numbers = torch.from_numpy(values.view("float32").copy())
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


def inputs(shape: tuple[int, int, int], stream: Any, compute: Any, device: str) -> tuple[Any, ...]:
    """x, branch, gate, bias, shift, scale, rows of very different size."""
    generator = torch.Generator().manual_seed(5)
    batch, _, channels = shape

    def draw(*shape: int, dtype: torch.dtype = compute) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    wide = draw(batch, 3 * channels)
    gate, shift, scale = wide.chunk(3, 1)
    return draw(*shape, dtype=stream), draw(*shape), gate, draw(channels), shift, scale


def leaves(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(value.detach().requires_grad_() for value in values)


def bits(values: Tensor) -> Tensor:
    """Of e4m3; all that is not a number is one, whatever its sign."""
    return torch.where(values.float().isnan(), 127, values.view(torch.uint8))


def check_rows(y: Tensor, values: Tensor, scale: Tensor) -> None:
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous()
    assert values.shape == y.shape and scale.shape == (*y.shape[:2], 1)
    if y.numel():
        wanted = quantise(y.detach().flatten(0, 1), "row")
        torch.testing.assert_close(
            scale.flatten(0, 1), wanted.scale, rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(bits(values.flatten(0, 1)), bits(wanted.values))


@every_backend
@every_case
def test_rows_are_those_of_y_and_the_rest_is_unchanged(backend, device, shape, stream, compute):
    """Forward and backward, with a branch and without."""
    x, branch, gate, bias, shift, scale = leaves(*inputs(shape, stream, compute, device))
    d_sum, d_y = torch.randn_like(x), torch.randn(shape, device=device).to(compute)
    total, y, values, row_scale = gate_residual_norm_modulate_e4m3(
        x, branch, gate, shift, scale, bias_D=bias, backend=backend
    )
    check_rows(y, values, row_scale)
    assert not values.requires_grad and not row_scale.requires_grad
    plain = op.gate_residual_norm_modulate(
        x, branch, gate, shift, scale, bias_D=bias, backend=backend
    )
    assert torch.equal(total, plain[0]) and torch.equal(y, plain[1])
    if INTERPRETING:  # slowly; and its backward pass is the op's
        return
    of = (x, branch, gate, bias, shift, scale)
    ours, theirs = (torch.autograd.grad(pair, of, (d_sum, d_y)) for pair in ((total, y), plain))
    assert all(map(torch.equal, ours, theirs))

    y, values, row_scale = norm_modulate_e4m3(x, shift, scale, backend=backend)
    check_rows(y, values, row_scale)
    plain_y = op.norm_modulate(x, shift, scale, backend=backend)
    assert torch.equal(y, plain_y)
    of = (x, shift, scale)
    ours, theirs = (torch.autograd.grad(one, of, d_y) for one in (y, plain_y))
    assert all(map(torch.equal, ours, theirs))


@every_backend
@pytest.mark.parametrize("compute", [FP32, BF16])
def test_rows_that_are_special(backend, device, compute):
    """Zeros; the least numbers; what is not finite stays in its row, and is not hidden there."""
    x = torch.zeros(1, 6, 20, device=device)
    shift, scale = (torch.zeros(6, 20, device=device, dtype=compute) for _ in range(2))
    subnormal = 2e-38 if INTERPRETING and compute == BF16 else 1e-39  # there it knows none
    shift[1], shift[2], shift[3] = subnormal, 3e-38, 1e38
    shift[4, 3], shift[5, 3] = float("nan"), float("inf")
    shift[5, 4] = -1.0
    x = x.reshape(6, 1, 20)
    y, values, row_scale = norm_modulate_e4m3(x, shift, scale, backend=backend)
    check_rows(y, values, row_scale)
    assert (values[0].float() == 0).all() and row_scale[0] == torch.finfo(FP32).tiny
    assert (values[3].float() == 448).all() and row_scale[:4].isfinite().all()
    assert not row_scale[4:].isfinite().any()


@pytest.mark.skipif(INTERPRETING, reason="C++ is not interpreted")
def test_every_number_in_every_instruction_set(isa, monkeypatch):
    """All 65,536 numbers of bfloat16, on their way through a row's norm of a variance of zero."""
    library = cpp_cpu.library_functions(isa)
    monkeypatch.setattr(cpp_cpu, "library_functions", lambda: library)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16).reshape(-1, 128)
    x = torch.zeros(len(every), 1, 128)
    y, values, row_scale = norm_modulate_e4m3(x, every, torch.zeros_like(every), backend="cpp")
    assert torch.equal(y[:, 0].nan_to_num(0.0), every.nan_to_num(0.0))
    check_rows(y, values, row_scale)


@every_backend
def test_opcheck_and_a_graph_without_breaks(backend, device):
    if INTERPRETING:
        pytest.skip("the interpreter is no torch citizen")
    x, branch, gate, bias, shift, scale = leaves(*inputs((2, 5, 36), FP32, BF16, device))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")  # e4m3 has no more
    args = (x, branch, gate, bias, shift, scale, 1e-6, backend)
    torch.library.opcheck(gate_residual_norm_modulate_e4m3_op, args, test_utils=utilities)
    args = (x, shift, scale, 1e-6, backend)
    torch.library.opcheck(norm_modulate_e4m3_op, args, test_utils=utilities)

    def step(x: Tensor, branch: Tensor) -> Tensor:
        y, values, row_scale = norm_modulate_e4m3(x, shift, scale, backend=backend)
        total, z, more, more_scale = gate_residual_norm_modulate_e4m3(
            x, y * branch, gate, shift, scale, bias_D=bias, backend=backend
        )
        seen = (values.float() * row_scale).sum() + (more.float() * more_scale).sum()
        return (total**2).sum() + z.float().square().sum() + seen.detach()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        of = leaves(x, branch)
        total = function(*of)
        results.append((total.detach(), *torch.autograd.grad(total, of)))
    assert all(map(torch.equal, *results))


def test_a_gpu_without_e4m3_is_refused(monkeypatch):
    """Before a compiler says so in its own words."""
    pytest.importorskip("triton")
    from speed_kernels import e4m3
    from speed_kernels.gate_residual_norm_modulate import triton_gpu

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
    why = e4m3.unavailable(torch.device("cuda"))
    assert why == (
        "e4m3 needs a GPU of compute capability 8.9 or newer, and NVIDIA A100 has 8.0; "
        "choose model.products=native"
    )
    monkeypatch.setattr(e4m3, "unavailable", lambda device: why)
    with pytest.raises(ValueError, match=r"NVIDIA A100 has 8\.0"):
        x, branch, gate, bias, shift, scale = inputs((1, 2, 16), FP32, BF16, "cpu")
        triton_gpu.forward(
            x, branch, gate, bias, shift, scale, 1e-6, e4m3.Scaled(torch.empty(0), torch.empty(0))
        )
