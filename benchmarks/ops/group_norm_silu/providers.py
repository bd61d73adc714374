"""Group norm with SiLU and its rivals: functions of (x, weight, bias), differentiable by torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from speed_kernels import contract
from speed_kernels.group_norm_silu.op import group_norm_silu
from torch import Tensor

from benchmarks.harness.measure import Unavailable

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
NUM_GROUPS, EPS = 32, 1e-5
PROVIDERS = ("reference", "eager", "compile", "apex", "ours")


@dataclass(frozen=True)
class Problem:
    """inputs: x [B, C, H, W], weight and bias [C], which require gradients; grad: d loss / d y, like x."""

    inputs: tuple[Tensor, Tensor, Tensor]
    grad: Tensor

    def cast(
        self, dtype: torch.dtype, memory: torch.memory_format = torch.channels_last
    ) -> Problem:
        """The same numbers in another dtype and order of memory."""
        x, *operands = (each.detach().to(dtype) for each in self.inputs)
        leaves = [x.contiguous(memory_format=memory), *operands]
        grad = self.grad.to(dtype).contiguous(memory_format=memory)
        x, weight, bias = (each.requires_grad_() for each in leaves)
        return Problem((x, weight, bias), grad)


def make_problem(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    """Normal numbers of a fixed seed, in channels-last memory; weights and biases in x's dtype."""
    generator = torch.Generator(device).manual_seed(0)
    x, grad = torch.randn((2, *shape), generator=generator, device=device)
    weight, bias = torch.randn((2, shape[1]), generator=generator, device=device)
    return Problem((2 * x + 1, 1 + 0.1 * weight, 0.1 * bias), grad).cast(dtype)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's two operators, in x's order of memory where the device has such a kernel."""
    return F.silu(F.group_norm(x, NUM_GROUPS, weight, bias, EPS))


def ours(problem: Problem) -> Function:
    """Our kernel. Raises Unavailable where there is only a slower one."""
    choice = contract.choose("group_norm_silu", problem.grad.device)
    if choice.fallback:
        raise Unavailable(choice.reason)
    return lambda x, weight, bias: group_norm_silu(
        x, weight, bias, num_groups=NUM_GROUPS, eps=EPS, backend=choice.backend
    )


def apex(problem: Problem) -> Function:
    """NVIDIA apex's group norm for channels-last memory, with SiLU inside. Raises Unavailable."""
    if problem.grad.device.type != "cuda":
        raise Unavailable("apex runs on CUDA devices only")
    if importlib.util.find_spec("apex") is None or not importlib.util.find_spec("apex.contrib"):
        raise Unavailable(
            "NVIDIA apex is not installed (the package `apex` on PyPI is another one)"
        )
    x, weight, bias = problem.inputs
    try:
        module: Any = importlib.import_module("apex.contrib.group_norm")
        norm = module.GroupNorm(NUM_GROUPS, x.shape[1], eps=EPS, act="silu").to(x.device, x.dtype)

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            own = {"weight": weight, "bias": bias}
            return torch.func.functional_call(norm, own, (x,))

        torch.autograd.grad(function(x, weight, bias), problem.inputs, problem.grad)
    except Exception as error:  # built without this extension, or no kernel for this shape
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Unavailable(f"apex cannot run its group norm: {reason}") from error
    return function
