"""Group normalisation with weight, bias and SiLU, for images in channels-last memory.

For sample b and group g with N = H W C / G elements, channel c of g:

    mean = sum(x) / N,   variance = sum((x - mean)^2) / N,   rstd = 1 / sqrt(variance + eps)
    x_hat = (x - mean) rstd,   z = x_hat weight + bias,   y = z sigmoid(z), or z without SiLU

    d_z = d_y sigmoid(z) (1 + z (1 - sigmoid(z))),   d_weight = sum of d_z x_hat,   d_bias = sum of d_z
    d_x = rstd (weight d_z - mean_g(weight d_z) - x_hat mean_g(weight d_z x_hat))

Y. Wu and K. He, "Group normalization", 2018, section 3. Variances come from differences to means, never from a
difference of squares: parts of a sample are merged by T. Chan, G. Golub and R. LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances", 1979, equation 2.1. Statistics and sums are float32 or better, in
an order that depends on the shape of one sample alone, but for the sums over the batch in d_weight and d_bias. Kept
for the backward pass: x, weight, bias and the statistics, which are spread to channels.

Tolerance against float64, in units of 2^-19 (1 + |mean| rstd): y within 1 + |z| + |weight|, d_x within its group's
largest |d_x| or |weight d_y| rstd, d_bias within the sum of |d_z| + |d_y|, d_weight within the sum of
(|d_z| + |d_y|) (1 + |x_hat|); plus the rounding to their dtypes.

Shape legend: B samples, C channels, H rows and W columns of an image, 2 statistics (mean, rstd).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_kernels import contract
from speed_kernels.dispatch import DirectFunction, direct


def group_norm_silu(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    backend: str,
) -> Tensor:
    """silu(group_norm(x)). Returns y [B, C, H, W], like x and in channels-last memory.

    x_BCHW      float32, bfloat16 or float16 (float64 on the reference); any strides, but all except channels-last are
                copied, once in each pass
    weight_C    [C] in x's dtype or float32; bias_C likewise
    num_groups  a divisor of C
    eps         added to the variance; positive
    silu        False leaves out the SiLU
    backend     triton, cpp or reference (`speed_kernels.contract.choose`)

    Differentiable once, by x, weight and bias. Autocast changes no dtype. Raises ValueError on wrong arguments.
    """
    options = (num_groups, float(eps), silu, backend)
    if direct(x_BCHW):
        y_BCHW: Any = _GroupNormSilu.apply(x_BCHW, weight_C, bias_C, *options)
        return y_BCHW
    y_BCHW, _ = group_norm_silu_op(x_BCHW, weight_C, bias_C, *options)
    return y_BCHW


class _GroupNormSilu(DirectFunction):
    """`group_norm_silu_op` without torch's dispatcher."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        x_BCHW: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        num_groups: int,
        eps: float,
        silu: bool,
        backend: str,
    ) -> Tensor:
        y_BCHW, statistics_B2C = _computed(x_BCHW, weight_C, bias_C, num_groups, eps, silu, backend)
        ctx.options = (num_groups, silu, backend)
        ctx.save_for_backward(x_BCHW, weight_C, bias_C, statistics_B2C)
        return y_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_BCHW: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return *_differentiated(d_y_BCHW, *ctx.saved_tensors, *ctx.options), *[None] * 4


@torch.library.custom_op("speed_kernels::group_norm_silu", mutates_args=())
def group_norm_silu_op(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y, statistics [B, 2, C]): mean and rstd of every channel's group, float32 (float64 for a float64 x)."""
    return _computed(x_BCHW, weight_C, bias_C, num_groups, eps, silu, backend)


def _computed(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(x_BCHW, weight_C, bias_C, num_groups, eps, backend)
    if x_BCHW.numel() == 0:
        return _like(x_BCHW), _statistics(x_BCHW).zero_()
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    module = contract.implementation("group_norm_silu", backend)
    return module.group_norm_silu(x_BCHW, weight_C, bias_C, num_groups, eps, silu)


@group_norm_silu_op.register_fake
def _(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check(x_BCHW, weight_C, bias_C, num_groups, eps, backend)
    return _like(x_BCHW), _statistics(x_BCHW)


@torch.library.custom_op("speed_kernels::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward_op(
    d_y_BCHW: Tensor,
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_B2C: Tensor,
    num_groups: int,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x like x in channels-last memory, d_weight [C], d_bias [C] in their dtypes)."""
    return _differentiated(
        d_y_BCHW, x_BCHW, weight_C, bias_C, statistics_B2C, num_groups, silu, backend
    )


def _differentiated(
    d_y_BCHW: Tensor,
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_B2C: Tensor,
    num_groups: int,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if x_BCHW.numel() == 0:
        return _like(x_BCHW), weight_C.new_zeros(weight_C.shape), bias_C.new_zeros(bias_C.shape)
    d_y_BCHW, x_BCHW = (
        tensor.contiguous(memory_format=torch.channels_last) for tensor in (d_y_BCHW, x_BCHW)
    )
    module = contract.implementation("group_norm_silu", backend)
    return module.group_norm_silu_backward(
        d_y_BCHW, x_BCHW, weight_C, bias_C, statistics_B2C, num_groups, silu
    )


@group_norm_silu_backward_op.register_fake
def _(
    d_y_BCHW: Tensor,
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_B2C: Tensor,
    num_groups: int,
    silu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d_weight_C, d_bias_C = weight_C.new_empty(weight_C.shape), bias_C.new_empty(bias_C.shape)
    return _like(x_BCHW), d_weight_C, d_bias_C


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BCHW, weight_C, bias_C, *_ = inputs
    statistics_B2C = output[1]
    ctx.options = (inputs[3], *inputs[5:])  # all but eps
    ctx.mark_non_differentiable(statistics_B2C)
    ctx.save_for_backward(x_BCHW, weight_C, bias_C, statistics_B2C)


def _backward(ctx: Any, d_y_BCHW: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = group_norm_silu_backward_op(d_y_BCHW, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 4


group_norm_silu_op.register_autograd(_backward, setup_context=_setup_context)


def _like(x_BCHW: Tensor) -> Tensor:
    return torch.empty_like(x_BCHW, memory_format=torch.channels_last)


def _statistics(x_BCHW: Tensor) -> Tensor:
    dtype = torch.float64 if x_BCHW.dtype == torch.float64 else torch.float32
    return x_BCHW.new_empty((x_BCHW.shape[0], 2, x_BCHW.shape[1]), dtype=dtype)


def _check(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float, backend: str
) -> None:
    if x_BCHW.dim() != 4:
        raise ValueError(
            f"x_BCHW has the shape {tuple(x_BCHW.shape)}; it must be [B, C, H, W], so unsqueeze or flatten it"
        )
    contract.check_dtype("x_BCHW", x_BCHW.dtype, backend)
    num_channels = x_BCHW.shape[1]
    if num_groups < 1 or num_channels % num_groups != 0:
        raise ValueError(
            f"num_groups={num_groups} does not divide x's {num_channels} channels; choose a divisor"
        )
    if not eps > 0.0:
        raise ValueError(
            f"eps={eps} is not positive; a constant group needs it, so take 1e-5 or so"
        )
    for name, tensor in (("weight_C", weight_C), ("bias_C", bias_C)):
        if tensor.shape != (num_channels,):
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}; it must be [{num_channels}] as x has that many channels"
            )
        if tensor.dtype not in (x_BCHW.dtype, torch.float32):
            raise ValueError(
                f"{name} is {tensor.dtype} but x {x_BCHW.dtype}; cast {name} to that or to float32"
            )
        if tensor.device != x_BCHW.device:
            raise ValueError(
                f"{name} is on {tensor.device} but x on {x_BCHW.device}; move it there"
            )


def sample_inputs(
    device: torch.device | str = "cpu", backend: str = "reference"
) -> Iterator[tuple[Any, ...]]:
    """Small argument tuples of the op that cover shapes, dtypes and options; for opcheck and for tests."""
    generator = torch.Generator().manual_seed(5)
    cases = (
        ((2, 12, 5, 3), 4), ((3, 6, 1, 1), 3), ((2, 7, 4, 4), 7), ((1, 80, 3, 2), 2), ((0, 4, 2, 2), 2),
        ((2, 4, 0, 3), 2), ((2, 1, 3, 5), 1), ((2, 16, 9, 8), 4),
    )  # fmt: skip
    for index, (shape, num_groups) in enumerate(cases):
        x_BCHW = 2.0 * torch.randn(shape, generator=generator) + 1.0
        weight_C, bias_C = 1.0 + 0.5 * torch.randn(2, shape[1], generator=generator)
        for dtype in contract.DTYPES if index == 0 else contract.DTYPES[index % 3 : index % 3 + 1]:
            x = x_BCHW.to(device, dtype)
            if index % 2:
                x = x.contiguous(memory_format=torch.channels_last)
            operand = torch.float32 if index % 4 == 1 else dtype
            weight, bias = weight_C.to(device, operand), bias_C.to(device, operand)
            yield x, weight, bias, num_groups, (1e-5, 1e-3)[index % 2], index != 7, backend
