"""bias_gelu_linear: the product after the activation, whose backward pass makes the activation again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from speed_kernels.bias_gelu.op import (
    bias_gelu,
    bias_gelu_linear,
    bias_gelu_linear_backward_op,
    bias_gelu_linear_op,
)
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
NAMES = ("x", "bias_D", "weight_ND", "out_bias_N")

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def operands(
    device: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 7, 40)
) -> list[Tensor]:
    """x, bias, weight and output's bias of a layer with 24 outputs, which require gradients."""
    generator = torch.Generator().manual_seed(3)
    shapes = (shape, shape[-1:], (24, shape[-1]), (24,))
    tensors = [torch.randn(size, generator=generator) for size in shapes]
    tensors[2] *= 0.2
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def plain(x: Tensor, bias_D: Tensor, weight_ND: Tensor, out_bias_N: Tensor) -> Tensor:
    return F.linear(F.gelu(x + bias_D, approximate="tanh"), weight_ND, out_bias_N)


def gradients(
    function: Callable[..., Tensor], tensors: list[Tensor], **options: Any
) -> list[Tensor]:
    """Output and all gradients for a fixed upstream gradient."""
    out = function(*tensors, **options)
    generator = torch.Generator().manual_seed(4)
    upstream = torch.randn(out.shape, generator=generator).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


@every_backend
@pytest.mark.parametrize("shape", [(3, 7, 40), (5, 33), (16,), (300, 12), (0, 8)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)],
)
def test_is_gelu_then_linear(
    backend: str, device: str, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    """Each result within `tolerance` of its largest entry: what products of operands in this dtype allow."""
    tensors = operands(device, dtype, shape)
    got = gradients(bias_gelu_linear, tensors, backend=backend)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for tensor, like, expected in zip(
        got, (None, *tensors), gradients(plain, doubles), strict=True
    ):
        assert tensor.dtype == dtype and tensor.shape == expected.shape and tensor.is_contiguous()
        assert like is None or like.shape == tensor.shape
        if expected.numel() > 0:
            error = (tensor.double() - expected).abs().max()
            assert error <= tolerance * expected.abs().max()


@every_backend
def test_keeps_its_inputs_alone(backend: str, device: str) -> None:
    tensors = operands(device)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = bias_gelu_linear(*tensors, backend=backend)
        assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in tensors[:3])
        kept.clear()
        y = bias_gelu(*tensors[:2], backend=backend)
        assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in tensors[:2])
    assert out.requires_grad and y.requires_grad


@every_backend
def test_backward_changes_none_of_its_inputs(backend: str, device: str) -> None:
    tensors = operands(device)
    copies = [tensor.detach().clone() for tensor in tensors]
    out = bias_gelu_linear(*tensors, backend=backend)
    upstream = torch.ones_like(out)
    first = torch.autograd.grad(out, tensors, upstream, retain_graph=True)
    again = torch.autograd.grad(out, tensors, upstream)
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, tensors, copies)) and (upstream == 1).all()


@every_backend
@pytest.mark.parametrize("absent", ["bias_D", "out_bias_N"])
def test_absent_biases(backend: str, device: str, absent: str) -> None:
    tensors: dict[str, Any] = dict(zip(NAMES, operands(device), strict=True))
    zero = {**tensors, absent: torch.zeros_like(tensors[absent])}
    out = bias_gelu_linear(**{**tensors, absent: None}, backend=backend)
    wanted = bias_gelu_linear(**zero, backend=backend)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    leaves = [tensor for name, tensor in tensors.items() if name != absent]
    pairs = (torch.autograd.grad(result.sum(), leaves) for result in (out, wanted))
    for got, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@every_backend
@pytest.mark.parametrize("frozen", [("weight_ND",), ("x", "bias_D"), ("bias_D", "out_bias_N")])
def test_frozen_operands(backend: str, device: str, frozen: tuple[str, ...]) -> None:
    tensors = operands(device)
    everything = gradients(bias_gelu_linear, tensors, backend=backend)[1:]
    upstream = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(4)).to(device)
    held = [t.detach() if name in frozen else t for name, t in zip(NAMES, tensors, strict=True)]
    bias_gelu_linear(*held, backend=backend).backward(upstream)
    for name, tensor, expected in zip(NAMES, tensors, everything, strict=True):
        if name in frozen:
            assert tensor.grad is None
        else:
            assert tensor.grad is not None and torch.equal(tensor.grad, expected)


@every_backend
def test_a_weight_that_is_gathered_for_each_pass(backend: str, device: str) -> None:
    """Sharded parameters hold their values during forward and backward alone, in new memory each time."""
    tensors = operands(device)
    expected = gradients(bias_gelu_linear, tensors, backend=backend)
    parameters = [torch.nn.Parameter(tensor.detach().clone()) for tensor in tensors[1:]]
    values = [parameter.detach().clone() for parameter in parameters]
    out = bias_gelu_linear(tensors[0], *parameters, backend=backend)
    for parameter in parameters:
        parameter.data = torch.full((0,), float("nan"), device=device)
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.clone()
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(device)
    got = torch.autograd.grad(out, [tensors[0], *parameters], upstream)
    assert all(map(torch.equal, got, expected[1:]))


@every_backend
def test_autocast_changes_nothing(backend: str, device: str) -> None:
    tensors = operands(device)
    expected = gradients(bias_gelu_linear, tensors, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = gradients(bias_gelu_linear, tensors, backend=backend)
    assert got[0].dtype == torch.float32
    assert all(map(torch.equal, got, expected))


@every_backend
def test_a_weight_with_any_strides(backend: str, device: str) -> None:
    tensors = operands(device)
    expected = gradients(bias_gelu_linear, tensors, backend=backend)
    tensors[2] = tensors[2].detach().t().contiguous().t().requires_grad_()
    tensors[0] = tensors[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for got, wanted in zip(
        gradients(bias_gelu_linear, tensors, backend=backend), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETING, reason="torch's side is the same for all backends")
@every_backend
def test_opcheck(backend: str, device: str) -> None:
    tensors = operands(device)
    for args in (tensors, [tensors[0], None, tensors[2], None], operands(device, shape=(0, 8))):
        torch.library.opcheck(bias_gelu_linear_op, (*args, backend))
    x, bias_D, weight_ND, _ = (tensor.detach() for tensor in tensors)
    d_out = torch.ones(3, 7, 24, device=device)
    for bias, need_weight in ((bias_D, True), (None, False)):
        args = (d_out, x, bias, weight_ND, need_weight, backend)
        torch.library.opcheck(bias_gelu_linear_backward_op, args)


@pytest.mark.skipif(INTERPRETING, reason="torch's side is the same for all backends")
@every_backend
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(backend: str, device: str, autocast: bool) -> None:
    def step(x: Tensor, *rest: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            return 3.0 * bias_gelu_linear(2.0 * x, *rest, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, got = (gradients(function, operands(device)) for function in (step, compiled))
    assert all(map(torch.equal, got, expected))


Change = Callable[[dict[str, Any]], Any]
REFUSALS: list[tuple[str, Change]] = [
    (r"weight_ND has the shape \(24, 39\)", lambda a: a.update(weight_ND=a["weight_ND"][:, 1:])),
    (r"weight_ND has the shape \(40,\); it must", lambda a: a.update(weight_ND=a["weight_ND"][0])),
    ("weight_ND is torch.float16", lambda a: a.update(weight_ND=a["weight_ND"].half())),
    (r"out_bias_N has the shape \(23,\)", lambda a: a.update(out_bias_N=a["out_bias_N"][1:])),
    ("out_bias_N is torch.bfloat16", lambda a: a.update(out_bias_N=a["out_bias_N"].bfloat16())),
    ("bias_D is torch.float16 but x", lambda a: a.update(bias_D=a["bias_D"].half())),
    ("x is torch.float64", lambda a: a.update(x=a["x"].double())),
]


@pytest.mark.skipif(INTERPRETING, reason="the same for all backends")
@pytest.mark.parametrize(("message", "change"), REFUSALS)
def test_wrong_arguments_are_refused(message: str, change: Change) -> None:
    arguments: dict[str, Any] = dict(zip(NAMES, operands("cpu"), strict=True))
    change(arguments)
    with pytest.raises(ValueError, match=message):
        bias_gelu_linear(**arguments, backend="cpp")
