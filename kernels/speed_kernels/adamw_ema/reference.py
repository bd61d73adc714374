"""AdamW + EMA in plain torch: the definition, in float32 or float64, on any device, without a host synchronisation.

In float64 all arithmetic is double; the per-step scalars stay the float32 numbers that every backend gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from speed_kernels.adamw_ema import layout


def unavailable() -> str | None:
    """Why this backend cannot run here, or None: plain torch runs everywhere."""
    return None


def grad_square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares, accumulated in float64."""
    total = torch.stack([grad.to(torch.float64).square().sum() for grad in grads]).sum()
    return total if grads[0].dtype == torch.float64 else total.to(torch.float32)


def prepare(
    step: Tensor,
    skipped: Tensor | None,
    hyper: Tensor,
    square_sum: Tensor | None,
    grad_scale: Tensor | None,
) -> Tensor:
    """The scalars of one step, float32 [SCALARS_SIZE]; see op.prepare."""
    one = torch.ones((), dtype=torch.float64, device=step.device)
    scale = one if grad_scale is None else grad_scale.to(torch.float64).reshape(())
    apply = torch.isfinite(scale)
    norm = torch.zeros_like(one)
    if square_sum is not None:
        apply = apply & torch.isfinite(square_sum).reshape(())
        norm = scale.abs() * square_sum.to(torch.float64).reshape(()).sqrt()
    step.add_(apply)
    if skipped is not None:
        skipped.add_(~apply)
    t = step.to(torch.float64).reshape(()).clamp(min=1.0)
    values = hyper.to(torch.float64)
    lr, weight1, weight2 = (
        values[i] for i in (layout.LR, layout.ONE_MINUS_BETA1, layout.ONE_MINUS_BETA2)
    )
    clip = values[layout.CLIP_NORM]
    factor = torch.where(clip > 0.0, (clip / (norm + 1e-6)).clamp(max=1.0), one)
    scalars = {
        layout.APPLY: apply,
        layout.GRAD_SCALE: scale * factor,
        layout.BETA2: 1.0 - weight2,
        layout.GRAD_WEIGHT: weight1,
        layout.SQUARE_WEIGHT: weight2,
        layout.DECAY: 1.0 - lr * values[layout.WEIGHT_DECAY],
        layout.STEP_SIZE: lr / -torch.expm1(t * torch.log1p(-weight1)),
        layout.DENOM_SCALE: (-torch.expm1(t * torch.log1p(-weight2))).rsqrt(),
        layout.DENOM_EPS: values[layout.EPS],
        layout.EMA_WEIGHT: _ema_weight(values[layout.EMA_KIND], values[layout.EMA_VALUE], t),
        layout.SECOND_EMA_WEIGHT: _ema_weight(
            values[layout.SECOND_EMA_KIND], values[layout.SECOND_EMA_VALUE], t
        ),
        layout.GRAD_NORM: norm,
    }
    return torch.stack([scalars[i].to(torch.float32) for i in range(layout.SCALARS_SIZE)])


def _ema_weight(kind: Tensor, value: Tensor, t: Tensor) -> Tensor:
    """1 - decay at step t = 1, 2, ..."""
    warmup = torch.maximum(value, 9.0 / (9.0 + t))
    power = -torch.expm1((value + 1.0) * torch.log1p(-1.0 / t))
    ramp_up = (
        math.log(2.0) / layout.RAMP_UP / (t - 1.0)
    )  # infinite at t = 1: the EMA is the weights
    half_life = -torch.expm1(-torch.maximum(value, ramp_up))
    weight = torch.where(kind == 3.0, half_life, value)
    return torch.where(kind == 1.0, warmup, torch.where(kind == 2.0, power, weight))


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    second_emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    scalars: Tensor,
) -> None:
    """One step in place, tensor by tensor; see op.adamw_ema."""
    s = scalars.to(params[0].dtype)
    apply = scalars[layout.APPLY] != 0.0
    for i, (p, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
        g = grads[i].to(p.dtype).reshape(p.shape) * s[layout.GRAD_SCALE]
        new_m = m.reshape(p.shape) + s[layout.GRAD_WEIGHT] * (g - m.reshape(p.shape))
        new_v = s[layout.BETA2] * v.reshape(p.shape) + s[layout.SQUARE_WEIGHT] * (g * g)
        denom = new_v.sqrt() * s[layout.DENOM_SCALE] + s[layout.DENOM_EPS]
        new_p = s[layout.DECAY] * p - s[layout.STEP_SIZE] * (new_m / denom)
        targets = [(p, new_p), (m, new_m), (v, new_v)]
        for averages, weight in (
            (emas, layout.EMA_WEIGHT),
            (second_emas, layout.SECOND_EMA_WEIGHT),
        ):
            if averages:
                old = averages[i].reshape(p.shape)
                targets.append((averages[i], old + s[weight] * (new_p - old)))
        if copies:
            targets.append((copies[i], new_p.to(copies[i].dtype)))
        for target, new in targets:
            target.copy_(torch.where(apply, new.reshape(target.shape), target))
