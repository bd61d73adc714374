"""Gate, residual sum, LayerNorm and modulation of a transformer with adaptive norms, in one pass over the data.

    sum = x + gate (branch + bias)                          rounded to x's dtype: the residual stream
    n   = (sum - mean) / sqrt(var + eps)                    over the channels, statistics of the rounded sum
    y   = n (1 + scale) + shift                             rounded once, to shift's dtype

W. Peebles and S. Xie, "Scalable diffusion models with transformers", 2023: the glue between two branches (adaLN-Zero).
With g = d_y (1 + scale) and means over the channels, the backward pass is

    d_x      = d_sum + (g - mean(g) - n mean(g n)) / sqrt(var + eps)
    d_branch = gate d_x                                     d_bias  = sum of gate d_x over samples and tokens
    d_gate   = sum of (branch + bias) d_x over tokens       d_shift = sum of d_y      d_scale = sum of d_y n

Forward and backward read every input once and write every output once; the sums over tokens are taken in two stages in
a fixed order, so that every run gives the same result. Gradients pass through the rounding of the sum unchanged.

Tolerance against float64 of the same rounded sum, beside the rounding to the result's dtype: y within 2^-20 of
max|n| |1 + scale| + |shift|, d_x and d_branch within 2^-20 and sums over tokens within 2^-18 of the sum of the
magnitudes of their terms. The mean is kept for the backward pass as one float32, so that its n may be off by
2^-23 |mean| rstd. Rows whose squares overflow float32 lose nothing by it.

Shape legend: B samples, T tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_kernels import contract
from speed_kernels.dispatch import DirectFunction, direct

NAME = "gate_residual_norm_modulate"
_STREAM = (torch.float32, torch.bfloat16)
_COMPUTE = (torch.float32, torch.bfloat16, torch.float16)


def norm_modulate(
    x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, *, eps: float = 1e-6, backend: str
) -> Tensor:
    """LayerNorm over the channels without parameters, then n (1 + scale) + shift. Returns y_BTD in shift's dtype.

    x_BTD       [B, T, D], float32 or bfloat16; copied where it is not contiguous
    shift_BD    [B, D], float32, bfloat16 or float16; may be a slice of a wider [B, ..] tensor (any stride between
                samples), which is not copied; scale_BD alike, of the same dtype
    eps         positive
    backend     triton, cpp or reference (`speed_kernels.contract.choose`)

    Differentiable once. Raises ValueError on wrong arguments.
    """
    if direct(x_BTD):
        y_BTD: Any = Normed.apply(x_BTD, shift_BD, scale_BD, float(eps), backend)
        return y_BTD
    return norm_modulate_op(x_BTD, shift_BD, scale_BD, float(eps), backend)[0]


def gate_residual_norm_modulate(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    *,
    bias_D: Tensor | None = None,
    eps: float = 1e-6,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """A branch's result into the residual stream, and the next branch's input. Returns (sum_BTD, y_BTD).

    x_BTD       [B, T, D], the residual stream, float32 or bfloat16; the sum has its dtype
    branch_BTD  [B, T, D], float32, bfloat16 or float16; gate, shift, scale and bias have its dtype, and so has y
    gate_BD     [B, D]; may be a slice of a wider [B, ..] tensor, which is not copied; shift_BD and scale_BD alike
    bias_D      [D], the bias of the branch's last matrix product, if that left it out
    eps         positive
    backend     triton, cpp or reference (`speed_kernels.contract.choose`)

    x and branch are copied where they are not contiguous. Differentiable once. Raises ValueError on wrong arguments.
    """
    args = (x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, float(eps), backend)
    if direct(x_BTD):
        results: Any = Gated.apply(*args)
        return results
    sum_BTD, y_BTD, _, _ = gate_residual_norm_modulate_op(*args)
    return sum_BTD, y_BTD


@torch.library.custom_op("speed_kernels::gate_residual_norm_modulate", mutates_args=())
def gate_residual_norm_modulate_op(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BD: Tensor,
    bias_D: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum_BTD, y_BTD, mean_BT float32, rstd_BT float32); see `gate_residual_norm_modulate`."""
    check(x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, eps)
    module = contract.implementation(NAME, backend)
    return module.forward(x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, eps)


@gate_residual_norm_modulate_op.register_fake
def _(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BD: Tensor,
    bias_D: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, eps)
    return x_BTD.new_empty(x_BTD.shape), *fake_norm(x_BTD, shift_BD)


@torch.library.custom_op("speed_kernels::gate_residual_norm_modulate_backward", mutates_args=())
def gate_residual_norm_modulate_backward_op(
    d_sum_BTD: Tensor | None,
    d_y_BTD: Tensor,
    sum_BTD: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
    branch_BTD: Tensor,
    gate_BD: Tensor,
    bias_D: Tensor | None,
    scale_BD: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(d_x, d_branch, d_gate, d_shift, d_scale, d_bias); d_bias has no elements without a bias. No d_sum is zero."""
    *grads, d_bias_D = contract.implementation(NAME, backend).backward(
        d_sum_BTD, d_y_BTD, sum_BTD, mean_BT, rstd_BT, branch_BTD, gate_BD, bias_D, scale_BD
    )
    return *grads, branch_BTD.new_empty(0) if d_bias_D is None else d_bias_D


@gate_residual_norm_modulate_backward_op.register_fake
def _(
    d_sum_BTD: Tensor | None,
    d_y_BTD: Tensor,
    sum_BTD: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
    branch_BTD: Tensor,
    gate_BD: Tensor,
    bias_D: Tensor | None,
    scale_BD: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_x_BTD, d_branch_BTD = sum_BTD.new_empty(sum_BTD.shape), branch_BTD.new_empty(sum_BTD.shape)
    d_gate_BD, d_shift_BD, d_scale_BD = (scale_BD.new_empty(scale_BD.shape) for _ in range(3))
    d_bias_D = branch_BTD.new_empty(0 if bias_D is None else bias_D.shape)
    return d_x_BTD, d_branch_BTD, d_gate_BD, d_shift_BD, d_scale_BD, d_bias_D


def keep_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch_BTD, gate_BD, bias_D, _, scale_BD, _, ctx.backend = inputs
    sum_BTD, _, mean_BT, rstd_BT = output
    ctx.mark_non_differentiable(mean_BT, rstd_BT)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sum_BTD, mean_BT, rstd_BT, branch_BTD, gate_BD, bias_D, scale_BD)


def differentiate_gated(
    ctx: Any, d_sum_BTD: Tensor | None, d_y_BTD: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    sum_BTD, mean_BT, rstd_BT, branch_BTD, gate_BD, bias_D, scale_BD = ctx.saved_tensors
    if d_y_BTD is None:
        d_y_BTD = torch.zeros(sum_BTD.shape, dtype=scale_BD.dtype, device=scale_BD.device)
    d_x_BTD, d_branch_BTD, d_gate_BD, d_shift_BD, d_scale_BD, d_bias_D = (
        gate_residual_norm_modulate_backward_op(
            d_sum_BTD, d_y_BTD, sum_BTD, mean_BT, rstd_BT, branch_BTD, gate_BD, bias_D, scale_BD, ctx.backend,
        )
    )  # fmt: skip
    d_bias_D = None if bias_D is None else d_bias_D
    return d_x_BTD, d_branch_BTD, d_gate_BD, d_bias_D, d_shift_BD, d_scale_BD, None, None


gate_residual_norm_modulate_op.register_autograd(differentiate_gated, setup_context=keep_gated)


@torch.library.custom_op("speed_kernels::norm_modulate", mutates_args=())
def norm_modulate_op(
    x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_BTD, mean_BT float32, rstd_BT float32); see `norm_modulate`."""
    check(x_BTD, None, None, None, shift_BD, scale_BD, eps)
    module = contract.implementation(NAME, backend)
    return module.forward(x_BTD, None, None, None, shift_BD, scale_BD, eps)[1:]


@norm_modulate_op.register_fake
def _(
    x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check(x_BTD, None, None, None, shift_BD, scale_BD, eps)
    return fake_norm(x_BTD, shift_BD)


@torch.library.custom_op("speed_kernels::norm_modulate_backward", mutates_args=())
def norm_modulate_backward_op(
    d_y_BTD: Tensor,
    x_BTD: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
    scale_BD: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, d_shift, d_scale)."""
    module = contract.implementation(NAME, backend)
    d_x_BTD, _, _, d_shift_BD, d_scale_BD, _ = module.backward(
        None, d_y_BTD, x_BTD, mean_BT, rstd_BT, None, None, None, scale_BD
    )
    return d_x_BTD, d_shift_BD, d_scale_BD


@norm_modulate_backward_op.register_fake
def _(
    d_y_BTD: Tensor,
    x_BTD: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
    scale_BD: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d_shift_BD, d_scale_BD = (scale_BD.new_empty(scale_BD.shape) for _ in range(2))
    return x_BTD.new_empty(x_BTD.shape), d_shift_BD, d_scale_BD


def keep_normed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BTD, _, scale_BD, _, ctx.backend = inputs
    _, mean_BT, rstd_BT = output
    ctx.mark_non_differentiable(mean_BT, rstd_BT)
    ctx.set_materialize_grads(False)  # none for the statistics; y always has one
    ctx.save_for_backward(x_BTD, mean_BT, rstd_BT, scale_BD)


def differentiate_normed(ctx: Any, d_y_BTD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *norm_modulate_backward_op(d_y_BTD, *ctx.saved_tensors, ctx.backend), None, None


norm_modulate_op.register_autograd(differentiate_normed, setup_context=keep_normed)


class Gated(DirectFunction):
    """`gate_residual_norm_modulate_op` without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, eps, backend = inputs
        check(x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, eps)
        module = contract.implementation(NAME, backend)
        sum_BTD, y_BTD, mean_BT, rstd_BT = module.forward(*inputs[:-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sum_BTD, mean_BT, rstd_BT, branch_BTD, gate_BD, bias_D, scale_BD)
        ctx.module = module
        return sum_BTD, y_BTD

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore
        ctx: Any, d_sum_BTD: Tensor | None, d_y_BTD: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        sum_BTD, mean_BT, rstd_BT, branch_BTD, gate_BD, bias_D, scale_BD = ctx.saved_tensors
        if d_y_BTD is None:
            d_y_BTD = torch.zeros(sum_BTD.shape, dtype=scale_BD.dtype, device=scale_BD.device)
        d_x_BTD, d_branch_BTD, d_gate_BD, d_shift_BD, d_scale_BD, d_bias_D = ctx.module.backward(
            d_sum_BTD, d_y_BTD, sum_BTD, mean_BT, rstd_BT, branch_BTD, gate_BD, bias_D, scale_BD
        )
        return d_x_BTD, d_branch_BTD, d_gate_BD, d_bias_D, d_shift_BD, d_scale_BD, None, None


class Normed(DirectFunction):
    """`norm_modulate_op` without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # pyright: ignore
        x_BTD, shift_BD, scale_BD, eps, backend = inputs
        check(x_BTD, None, None, None, shift_BD, scale_BD, eps)
        module = contract.implementation(NAME, backend)
        _, y_BTD, mean_BT, rstd_BT = module.forward(
            x_BTD, None, None, None, shift_BD, scale_BD, eps
        )
        ctx.save_for_backward(x_BTD, mean_BT, rstd_BT, scale_BD)
        ctx.module = module
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_BTD: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x_BTD, mean_BT, rstd_BT, scale_BD = ctx.saved_tensors
        d_x_BTD, _, _, d_shift_BD, d_scale_BD, _ = ctx.module.backward(
            None, d_y_BTD, x_BTD, mean_BT, rstd_BT, None, None, None, scale_BD
        )
        return d_x_BTD, d_shift_BD, d_scale_BD, None, None


def fake_norm(x_BTD: Tensor, shift_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of y, mean and rstd."""
    mean_BT, rstd_BT = (x_BTD.new_empty(x_BTD.shape[:2], dtype=torch.float32) for _ in range(2))
    return x_BTD.new_empty(x_BTD.shape, dtype=shift_BD.dtype), mean_BT, rstd_BT


def check(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
) -> None:
    if x_BTD.dim() != 3 or x_BTD.shape[2] == 0:
        raise ValueError(
            f"x_BTD has the shape {tuple(x_BTD.shape)}; it must be [samples, tokens, channels]: unflatten or flatten it"
        )
    if x_BTD.dtype not in _STREAM:
        raise ValueError(
            f"x_BTD is {x_BTD.dtype}; the residual stream must be float32 or bfloat16: cast it"
        )
    if shift_BD.dtype not in _COMPUTE:
        raise ValueError(
            f"shift_BD is {shift_BD.dtype}; it must be float32, bfloat16 or float16: cast it"
        )
    batch, _, channels = x_BTD.shape
    row = (batch, channels)
    for name, tensor, shape in (
        ("branch_BTD", branch_BTD, x_BTD.shape),
        ("gate_BD", gate_BD, row),
        ("bias_D", bias_D, (channels,)),
        ("shift_BD", shift_BD, row),
        ("scale_BD", scale_BD, row),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)} but x_BTD {tuple(x_BTD.shape)} asks for {tuple(shape)};"
                " pass one row per sample, of as many channels"
            )
        if tensor.dtype != shift_BD.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} but shift_BD {shift_BD.dtype}; cast all but x_BTD to one dtype"
            )
        if tensor.device != x_BTD.device:
            raise ValueError(
                f"{name} is on {tensor.device} but x_BTD on {x_BTD.device}; move it there"
            )
    if not (eps > 0.0 and math.isfinite(eps)):
        raise ValueError(f"eps={eps} must be a positive number, as 1e-6")


def sample_inputs(
    device: torch.device | str = "cpu", backend: str = "reference"
) -> Iterator[tuple[Any, ...]]:
    """Small argument tuples of the gated op that cover shapes, dtypes and options; for opcheck and for tests."""
    generator = torch.Generator().manual_seed(2)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [
        # shape, stream, compute, bias, modulation as slices of one wide product
        ((2, 5, 36), fp32, fp32, True, True),
        ((3, 7, 24), fp32, bf16, True, False),
        ((2, 3, 128), bf16, bf16, False, True),
        ((1, 1, 4), fp32, fp16, True, False),
        ((2, 9, 20), bf16, fp32, False, True),
        ((0, 4, 12), fp32, bf16, True, False),
        ((2, 0, 12), bf16, bf16, True, False),
    ]
    for (batch, tokens, channels), stream, compute, has_bias, sliced in cases:

        def draw(*shape: int, dtype: torch.dtype = compute) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        wide = draw(batch, 6 * channels)
        gate, shift, scale = (wide[:, i * channels : (i + 1) * channels] for i in (2, 0, 5))
        if not sliced:
            gate, shift, scale = (
                row.clone(memory_format=torch.contiguous_format) for row in (gate, shift, scale)
            )
        x, branch = draw(batch, tokens, channels, dtype=stream), draw(batch, tokens, channels)
        yield x, branch, gate, draw(channels) if has_bias else None, shift, scale, 1e-6, backend
