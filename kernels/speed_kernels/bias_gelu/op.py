"""Bias and GELU in one pass.

With u = x + bias, k = sqrt(2 / pi) and c = 0.044715:

    y   = u (1 + tanh(k (u + c u^3))) / 2 = u s,      s = sigmoid(q),  q = 2 k (u + c u^3)
    d_x = d_y (s + u s (1 - s) q'),                   q' = 2 k (1 + 3 c u^2)
    d_bias = sum of d_x over all rows

The tanh approximation of D. Hendrycks and K. Gimpel, "Gaussian error linear units", 2016, section 2, as torch's
`gelu(approximate="tanh")`. x is the product of a matrix WITHOUT its bias. Only x and bias are kept for the backward
pass, never y. Everything is computed in float32 and rounded once; u^3 may overflow, the result does not.

Tolerance against float64: y within 2^-21 (1 + |q| / 2) |y|, d_x within 2^-21 |d_y|, d_bias within 2^-21 of its sum of
|d_y|, plus the rounding to x's dtype. The column sums are taken in two stages of fixed order.

Shape legend: D columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_kernels import contract
from speed_kernels.dispatch import DirectFunction, direct


def bias_gelu(x: Tensor, bias_D: Tensor | None, *, backend: str) -> Tensor:
    """gelu(x + bias) with the tanh approximation. Returns y, like x and contiguous.

    x        [..., D] float32, bfloat16 or float16 (float64 on the reference); any strides
    bias_D   [D] in x's dtype, or None
    backend  triton, cpp or reference (`speed_kernels.contract.choose`)

    Any finite u gives a finite y (large ones u or -0), minus infinity gives not a number as torch's does.
    Differentiable once, by x and bias_D. Autocast changes no dtype. Raises ValueError on wrong arguments.
    """
    if direct(x):
        y: Any = _BiasGelu.apply(x, bias_D, backend)
        return y
    return bias_gelu_op(x, bias_D, backend)


class _BiasGelu(DirectFunction):
    """`bias_gelu_op` without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_D: Tensor | None, backend: str) -> Tensor:  # pyright: ignore
        _check(x, bias_D, backend)
        ctx.module = contract.implementation("bias_gelu", backend)
        ctx.save_for_backward(x, bias_D)
        return ctx.module.bias_gelu(x, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, bias_D = ctx.saved_tensors
        d_x, d_bias_D = ctx.module.bias_gelu_backward(d_y, x, bias_D)
        return d_x, None if bias_D is None else d_bias_D, None


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
    return contract.implementation("bias_gelu", backend).bias_gelu_backward(d_y, x, bias_D)


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


def _check(x: Tensor, bias_D: Tensor | None, backend: str) -> None:
    if x.dim() < 1:
        raise ValueError("x has no dimension; give it the shape [..., D]")
    contract.check_dtype("x", x.dtype, backend)
    if bias_D is not None:
        _check_operand("bias_D", bias_D, (x.shape[-1],), x)


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
        for dtype in contract.DTYPES if index == 0 else contract.DTYPES[index % 3 : index % 3 + 1]:
            bias = None if index in (2, 5) else bias_D.to(dtype).to(device)
            yield x.to(dtype).to(device), bias, backend
