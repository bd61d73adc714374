"""Bias and GELU in one pass, and the linear layer after it with the activation made again in its backward pass.

With u = x + bias, k = sqrt(2 / pi) and c = 0.044715:

    y   = u (1 + tanh(k (u + c u^3))) / 2 = u s,      s = sigmoid(q),  q = 2 k (u + c u^3)
    d_x = d_y (s + u s (1 - s) q'),                   q' = 2 k (1 + 3 c u^2)
    d_bias = sum of d_x over all rows

The tanh approximation of D. Hendrycks and K. Gimpel, "Gaussian error linear units", 2016, section 2, as torch's
`gelu(approximate="tanh")`. x is the product of a matrix WITHOUT its bias. Only x and bias are kept for the backward
pass, never y. Everything is computed in float32 and rounded once; u^3 may overflow, the result does not.

Tolerance against float64: y within 2^-21 (1 + |q| / 2) |y|, d_x within 2^-21 |d_y|, d_bias within 2^-21 of its sum of
|d_y|, plus the rounding to x's dtype. The column sums are taken in two stages of fixed order.

Shape legend: R rows, D columns, N columns of the linear layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from speed_kernels import contract
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 as well on the reference


def bias_gelu(x: Tensor, bias_D: Tensor | None, *, backend: str) -> Tensor:
    """gelu(x + bias) with the tanh approximation. Returns y, like x and contiguous.

    x        [..., D] float32, bfloat16 or float16 (float64 on the reference); any strides
    bias_D   [D] in x's dtype, or None
    backend  triton, cpp or reference (`speed_kernels.contract.choose`)

    Any finite u gives a finite y (large ones u or -0), minus infinity gives not a number as torch's does.
    Differentiable once, by x and bias_D. Autocast changes no dtype. Raises ValueError on wrong arguments.
    """
    return bias_gelu_op(x, bias_D, backend)


def bias_gelu_linear(
    x: Tensor,
    bias_D: Tensor | None,
    weight_ND: Tensor,
    out_bias_N: Tensor | None,
    *,
    backend: str,
) -> Tensor:
    """linear(bias_gelu(x, bias_D), weight_ND, out_bias_N). Returns [..., N], like x and contiguous.

    x          [..., D] float32, bfloat16 or float16 (float64 on the reference); any strides
    bias_D     [D] or None; weight_ND [N, D]; out_bias_N [N] or None (left out: who adds it elsewhere owns it)
    backend    triton, cpp or reference (`speed_kernels.contract.choose`)

    Keeps x, bias_D and weight_ND alone: the activation for the weight's gradient is made again by the launch that makes
    x's gradient. All operands have one dtype, which autocast does not change. The weight's gradient is what torch's
    matrix product makes of it. Differentiable once, by all four. Raises ValueError on wrong arguments.
    """
    return bias_gelu_linear_op(x, bias_D, weight_ND, out_bias_N, backend)


@torch.library.custom_op("speed_kernels::bias_gelu", mutates_args=())
def bias_gelu_op(x: Tensor, bias_D: Tensor | None, backend: str) -> Tensor:
    """See `bias_gelu`."""
    _check(x, bias_D, backend)
    return contract.implementation("bias_gelu", backend).bias_gelu(x, bias_D)


@bias_gelu_op.register_fake
def _(x: Tensor, bias_D: Tensor | None, backend: str) -> Tensor:
    _check(x, bias_D, backend)
    return x.new_empty(x.shape)


@torch.library.custom_op("speed_kernels::bias_gelu_backward", mutates_args=())
def bias_gelu_backward_op(
    d_y: Tensor, x: Tensor, bias_D: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(d_x like x, d_bias [D]); d_bias is empty without a bias."""
    module = contract.implementation("bias_gelu", backend)
    d_x, d_bias_D, _ = module.bias_gelu_backward(d_y, x, bias_D, False, False)
    return d_x, d_bias_D


@bias_gelu_backward_op.register_fake
def _(d_y: Tensor, x: Tensor, bias_D: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias_D is None else x.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias_D, ctx.backend = inputs
    ctx.save_for_backward(x, bias_D)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, bias_D = ctx.saved_tensors
    d_x, d_bias_D = bias_gelu_backward_op(d_y, x, bias_D, ctx.backend)
    return d_x, None if bias_D is None else d_bias_D, None


bias_gelu_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("speed_kernels::bias_gelu_linear", mutates_args=())
def bias_gelu_linear_op(
    x: Tensor, bias_D: Tensor | None, weight_ND: Tensor, out_bias_N: Tensor | None, backend: str
) -> Tensor:
    """See `bias_gelu_linear`."""
    _check_linear(x, bias_D, weight_ND, out_bias_N, backend)
    y = contract.implementation("bias_gelu", backend).bias_gelu(x, bias_D)
    # Autocast is above this op, not inside it: it would cast float32 operands.
    with torch.autocast(x.device.type, enabled=False):
        out_RN = F.linear(_as_matrix(y), weight_ND, out_bias_N)
    return out_RN.view(*x.shape[:-1], weight_ND.shape[0])


@bias_gelu_linear_op.register_fake
def _(
    x: Tensor, bias_D: Tensor | None, weight_ND: Tensor, out_bias_N: Tensor | None, backend: str
) -> Tensor:
    _check_linear(x, bias_D, weight_ND, out_bias_N, backend)
    return x.new_empty((*x.shape[:-1], weight_ND.shape[0]))


@torch.library.custom_op("speed_kernels::bias_gelu_linear_backward", mutates_args=())
def bias_gelu_linear_backward_op(
    d_out: Tensor,
    x: Tensor,
    bias_D: Tensor | None,
    weight_ND: Tensor,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x like x, d_bias [D], d_weight [N, D]); empty where there is no bias or no need."""
    d_out_RN = _as_matrix(d_out)
    module = contract.implementation("bias_gelu", backend)
    with torch.autocast(x.device.type, enabled=False):
        d_y = (d_out_RN @ weight_ND).view(x.shape)
        # d_y is nobody else's: d_x takes its place, so that three tensors of this size are alive and not four.
        d_x, d_bias_D, y = module.bias_gelu_backward(d_y, x, bias_D, need_weight, True)
        if not need_weight:
            return d_x, d_bias_D, weight_ND.new_empty(0)
        return d_x, d_bias_D, d_out_RN.t() @ _as_matrix(y)


@bias_gelu_linear_backward_op.register_fake
def _(
    d_out: Tensor,
    x: Tensor,
    bias_D: Tensor | None,
    weight_ND: Tensor,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias_D = x.new_empty(0 if bias_D is None else x.shape[-1])
    return x.new_empty(x.shape), d_bias_D, x.new_empty(weight_ND.shape if need_weight else (0,))


def _setup_linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias_D, weight_ND, _, ctx.backend = inputs
    ctx.save_for_backward(x, bias_D, weight_ND)


def _linear_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, bias_D, weight_ND = ctx.saved_tensors
    _, need_bias, need_weight, need_out_bias, _ = ctx.needs_input_grad
    d_x, d_bias_D, d_weight_ND = bias_gelu_linear_backward_op(
        d_out, x, bias_D, weight_ND, need_weight, ctx.backend
    )
    d_out_bias_N = _as_matrix(d_out).sum(0, dtype=d_out.dtype) if need_out_bias else None
    return (
        d_x,
        d_bias_D if need_bias else None,
        d_weight_ND if need_weight else None,
        d_out_bias_N,
        None,
    )


bias_gelu_linear_op.register_autograd(_linear_backward, setup_context=_setup_linear_context)


def _as_matrix(tensor: Tensor) -> Tensor:
    """[..., D] -> [R, D], also where D is zero."""
    return tensor.unsqueeze(0).flatten(0, -2)


def _check(x: Tensor, bias_D: Tensor | None, backend: str) -> None:
    if x.dim() < 1:
        raise ValueError("x has no dimension; give it the shape [..., D]")
    if x.dtype not in DTYPES and not (x.dtype == torch.float64 and backend == "reference"):
        raise ValueError(
            f"x is {x.dtype}, which the {backend} backend cannot take; cast it to float32, bfloat16 or float16"
        )
    if bias_D is not None:
        _check_operand("bias_D", bias_D, (x.shape[-1],), x)


def _check_linear(
    x: Tensor, bias_D: Tensor | None, weight_ND: Tensor, out_bias_N: Tensor | None, backend: str
) -> None:
    _check(x, bias_D, backend)
    if weight_ND.dim() != 2:
        raise ValueError(
            f"weight_ND has the shape {tuple(weight_ND.shape)}; it must be [N, {x.shape[-1]}], as of torch.nn.Linear"
        )
    _check_operand("weight_ND", weight_ND, (weight_ND.shape[0], x.shape[-1]), x)
    if out_bias_N is not None:
        _check_operand("out_bias_N", out_bias_N, (weight_ND.shape[0],), x)


def _check_operand(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)} but x {tuple(x.shape)} asks for {shape}; reshape one of them"
        )
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} is {tensor.dtype} but x {x.dtype}; cast {name} to x's dtype")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x on {x.device}; move it there")


def sample_inputs(
    device: torch.device | str = "cpu", backend: str = "reference"
) -> Iterator[tuple[Any, ...]]:
    """Small argument tuples of the op that cover shapes, dtypes and options; for opcheck and for tests."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((3, 5, 48), (70, 33), (2, 1), (19,), (0, 16), (4, 600), (2, 3, 0))
    for index, shape in enumerate(shapes):
        x = 3.0 * torch.randn(shape, generator=generator)
        bias_D = torch.randn(shape[-1:], generator=generator)
        for dtype in DTYPES if index == 0 else DTYPES[index % 3 : index % 3 + 1]:
            bias = None if index in (2, 5) else bias_D.to(dtype).to(device)
            yield x.to(dtype).to(device), bias, backend
