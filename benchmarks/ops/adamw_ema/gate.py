"""The correctness gate of the optimizer step: three steps of any provider against AdamW and EMA written in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.harness.measure import GateError
from benchmarks.ops.adamw_ema import providers as rivals
from benchmarks.ops.adamw_ema.providers import Problem, Stepper

SHAPES = ((3, 5), (257,), (1,), (64, 33), (4, 4, 2, 2))
NUM_STEPS = 3
DECAY = 0.9  # so that three steps of EMA are far above float32's rounding


def check(
    build: Callable[[Problem], Stepper],
    device: torch.device,
    form: Literal["list", "flat"],
    mixed: bool,
) -> None:
    """Raises GateError with the first tensor that is off."""
    torch.manual_seed(1)
    problem = rivals.make_problem(SHAPES, device, form, mixed, DECAY)
    stepper = build(problem)
    params = [param.detach().double() for param in problem.params]
    start = [param.clone() for param in params]
    emas = [param.clone() for param in params]
    moments, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
    for t in range(1, NUM_STEPS + 1):
        for grad in problem.grads:
            # The scale changes, so that clipping is at work in some steps and idle in others.
            grad.copy_(torch.randn(grad.shape).to(grad) * (0.3 if t == 2 else 0.003))
        stepper.step()
        _step64(params, [grad.double() for grad in problem.grads], moments, squares, emas, mixed, t)
    for index, (param, ema) in enumerate(zip(problem.params, stepper.emas(), strict=True)):
        moved = (params[index] - start[index]).abs().max()
        for name, found, expected in (("weight", param, params[index]), ("ema", ema, emas[index])):
            error = (found.detach().double() - expected).abs()
            limit = 4 * 2.0**-24 * expected.abs() + 1e-4 * moved
            if not bool((error <= limit).all()):
                raise GateError(
                    f"{name} {index} is off by {float((error / limit).max()):.3g} times the tolerance"
                )
        if mixed and not torch.equal(problem.copies[index], param.detach().bfloat16()):
            raise GateError(f"copy {index} is not the rounded weight")


def _step64(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    emas: Sequence[Tensor],
    clip: bool,
    t: int,
) -> None:
    """I. Loshchilov and F. Hutter 2019, algorithm 2, with a constant learning rate; then the EMA."""
    factor = 1.0
    if clip:
        norm = float(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt())
        factor = min(1.0, rivals.CLIP / (norm + 1e-6))
    beta1, beta2 = rivals.BETAS
    for param, grad, m, v, ema in zip(params, grads, moments, squares, emas, strict=True):
        g = grad.reshape(param.shape) * factor
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + rivals.EPS)
        param.mul_(1 - rivals.LR * rivals.WEIGHT_DECAY).sub_(rivals.LR * step)
        ema.mul_(DECAY).add_((1 - DECAY) * param)
