"""The op for a next product in e4m3: beside y, its rows in e4m3 and their scales, made where y is made.

They are `speed_kernels.e4m3.quantise` of the rounded y, bit for bit. They have no gradient; the backward pass is the
op's own.

Shape legend: B samples, T tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_kernels import contract
from speed_kernels.dispatch import DirectFunction, direct
from speed_kernels.e4m3 import E4M3, Scaled
from speed_kernels.gate_residual_norm_modulate import op


def norm_modulate_e4m3(
    x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, *, eps: float = 1e-6, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`op.norm_modulate`, and what a product in e4m3 takes: (y_BTD, values_BTD e4m3, scale_BT1 float32).

    Raises ValueError on wrong arguments, and with the backend triton on a GPU older than compute capability 8.9.
    """
    args = (x_BTD, shift_BD, scale_BD, float(eps), backend)
    if direct(x_BTD):
        results: Any = _Normed.apply(*args)
        return results
    y_BTD, _, _, values_BTD, scale_BT1 = norm_modulate_e4m3_op(*args)
    return y_BTD, values_BTD, scale_BT1


def gate_residual_norm_modulate_e4m3(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    *,
    bias_D: Tensor | None = None,
    eps: float = 1e-6,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`op.gate_residual_norm_modulate`, likewise: (sum_BTD, y_BTD, values_BTD e4m3, scale_BT1 float32)."""
    args = (x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, float(eps), backend)
    if direct(x_BTD):
        results: Any = _Gated.apply(*args)
        return results
    sum_BTD, y_BTD, _, _, values_BTD, scale_BT1 = gate_residual_norm_modulate_e4m3_op(*args)
    return sum_BTD, y_BTD, values_BTD, scale_BT1


def _fresh(x_BTD: Tensor) -> Scaled:
    values_BTD = torch.empty(x_BTD.shape, dtype=E4M3, device=x_BTD.device)
    scale_BT1 = torch.empty(*x_BTD.shape[:2], 1, dtype=torch.float32, device=x_BTD.device)
    return Scaled(values_BTD, scale_BT1)


def _forward(inputs: tuple[Any, ...]) -> Any:
    """(sum or None, y, mean, rstd, values, scale); inputs: of the gated op, its branch, gate and bias perhaps None."""
    x_BTD, _, _, _, _, _, _, backend = inputs
    op.check(*inputs[:-1])
    rows = _fresh(x_BTD)
    results: Any = contract.implementation(op.NAME, backend).forward(*inputs[:-1], rows)
    return *results, *rows


@torch.library.custom_op("speed_kernels::gate_residual_norm_modulate_e4m3", mutates_args=())
def gate_residual_norm_modulate_e4m3_op(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BD: Tensor,
    bias_D: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum_BTD, y_BTD, mean_BT, rstd_BT, values_BTD e4m3, scale_BT1 float32)."""
    return _forward((x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, eps, backend))


@gate_residual_norm_modulate_e4m3_op.register_fake
def _(
    x_BTD: Tensor,
    branch_BTD: Tensor,
    gate_BD: Tensor,
    bias_D: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op.check(x_BTD, branch_BTD, gate_BD, bias_D, shift_BD, scale_BD, eps)
    norm, (values_BTD, scale_BT1) = op.fake_norm(x_BTD, shift_BD), _fresh(x_BTD)
    return x_BTD.new_empty(x_BTD.shape), *norm, values_BTD, scale_BT1


@torch.library.custom_op("speed_kernels::norm_modulate_e4m3", mutates_args=())
def norm_modulate_e4m3_op(
    x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_BTD, mean_BT, rstd_BT, values_BTD e4m3, scale_BT1 float32)."""
    return _forward((x_BTD, None, None, None, shift_BD, scale_BD, eps, backend))[1:]


@norm_modulate_e4m3_op.register_fake
def _(
    x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op.check(x_BTD, None, None, None, shift_BD, scale_BD, eps)
    values_BTD, scale_BT1 = _fresh(x_BTD)
    return *op.fake_norm(x_BTD, shift_BD), values_BTD, scale_BT1


def _keep_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    op.keep_gated(ctx, inputs, output[:4])
    ctx.mark_non_differentiable(*output[2:])


def _keep_normed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    op.keep_normed(ctx, inputs, output[:3])
    ctx.mark_non_differentiable(*output[1:])


gate_residual_norm_modulate_e4m3_op.register_autograd(
    op.differentiate_gated, setup_context=_keep_gated
)
norm_modulate_e4m3_op.register_autograd(op.differentiate_normed, setup_context=_keep_normed)


class _Gated(DirectFunction):
    """`gate_residual_norm_modulate_e4m3_op` without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # pyright: ignore
        _, branch_BTD, gate_BD, bias_D, _, scale_BD, _, backend = inputs
        sum_BTD, y_BTD, mean_BT, rstd_BT, *rows = _forward(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rows)
        ctx.save_for_backward(sum_BTD, mean_BT, rstd_BT, branch_BTD, gate_BD, bias_D, scale_BD)
        ctx.module = contract.implementation(op.NAME, backend)
        return sum_BTD, y_BTD, *rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return op.Gated.backward(ctx, *grads[:2])


class _Normed(DirectFunction):
    """`norm_modulate_e4m3_op` without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # pyright: ignore
        x_BTD, shift_BD, scale_BD, eps, backend = inputs
        results = _forward((x_BTD, None, None, None, shift_BD, scale_BD, eps, backend))
        _, y_BTD, mean_BT, rstd_BT, *rows = results
        ctx.set_materialize_grads(False)  # none for the rows; y always has one
        ctx.mark_non_differentiable(*rows)
        ctx.save_for_backward(x_BTD, mean_BT, rstd_BT, scale_BD)
        ctx.module = contract.implementation(op.NAME, backend)
        return y_BTD, *rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return op.Normed.backward(ctx, grads[0])
