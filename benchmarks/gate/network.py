"""The kernels inside a network against their definitions in float64, outputs and gradients, at DiT's and odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from speed_kernels.group_norm_silu.op import group_norm_silu
from torch import Tensor

from benchmarks.gate.numerics import poisoned, require
from benchmarks.ops.adaln import providers as rivals
from benchmarks.ops.adaln.providers import Problem

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the error's norm over the norm
WIDTHS = (384, 1152, 100)
IMAGES = ((2, 128, 16, 16), (3, 96, 7, 5))  # B, C, H, W
BF16, FP32 = torch.bfloat16, torch.float32


def gated_norm(device: torch.device, backend: str) -> str:
    """gate + residual + norm + modulate: the streams of DiT-S and XL, and a width that is no multiple of anything."""
    problems = [
        rivals.glue_problem(2, 64, width, stream, compute, device)
        for width in WIDTHS
        for stream, compute in ((FP32, FP32), (FP32, BF16), (BF16, BF16))
    ]
    return _all(problems, rivals.ours_glue)


def gelu(device: torch.device, backend: str) -> str:
    """bias + GELU."""
    problems = [
        rivals.gelu_problem(130, 4 * width, dtype, device)
        for width in WIDTHS
        for dtype in (FP32, BF16)
    ]
    return _all(problems, rivals.ours_gelu)


def attention(device: torch.device, backend: str) -> str:
    """Whatever implementation the engine takes here, for the heads of DiT-S and XL."""
    problems = [
        rivals.attention_problem(2, 256, heads, head, BF16, device)
        for heads, head in ((6, 64), (16, 72))
    ]
    return _all(problems, rivals.ours_attention)


def group_norm(device: torch.device, backend: str) -> str:
    """Group norm and SiLU of images in channels-last memory."""
    for shape in IMAGES:
        for dtype in (FP32, BF16):
            generator = torch.Generator().manual_seed(6)
            tensors = [torch.randn(shape, generator=generator)]
            tensors += [torch.randn(shape[1], generator=generator) for _ in range(2)]
            ours = [each.to(device, dtype).detach().requires_grad_() for each in tensors]
            exact = [each.detach().double().requires_grad_() for each in ours]
            d_y = torch.randn(shape, generator=generator).to(device, dtype)
            with poisoned():
                y = group_norm_silu(*ours, num_groups=32, backend=backend)
                found = [y, *torch.autograd.grad(y, ours, d_y)]
            y = F.silu(F.group_norm(exact[0], 32, *exact[1:], eps=1e-5))
            expected = [y, *torch.autograd.grad(y, exact, d_y.double())]
            _compare(f"group_norm {list(shape)} {dtype}", found, expected, TOLERANCE[dtype])
    return f"{2 * len(IMAGES)} combinations"


def _all(problems: list[Problem], ours: Callable[[Problem], rivals.Function]) -> str:
    for problem in problems:
        name = f"{problem.op} {'x'.join(map(str, problem.inputs[0].shape))}"
        with poisoned():
            found = _both(ours(problem), problem)
        exact = problem.cast(torch.float64)
        tolerance = max(TOLERANCE[each.dtype] for each in problem.inputs)
        _compare(name, found, _both(exact.truth, exact), tolerance)
    return f"{len(problems)} combinations"


def _both(function: rivals.Function, problem: Problem) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = function(*problem.inputs)
    return [*outputs, *torch.autograd.grad(outputs, problem.inputs, problem.grads)]


def _compare(name: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = float((one.detach().double() - other.detach()).norm() / other.detach().norm())
        require(error <= tolerance, f"{name}: result {index} is off by {error:.2e} of its norm")
