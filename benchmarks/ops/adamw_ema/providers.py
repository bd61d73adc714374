"""The rivals of one optimizer step: AdamW, then an EMA of the weights.

Recipe `plain`: float32 gradients, AdamW, EMA. Recipe `mixed`: bfloat16 gradients, clipping by the norm of all of
them, AdamW on float32 masters, EMA, and the rounded weights written to bfloat16 copies.
All providers of a case share weights and gradients; each has its own moments and EMA.
"""

# torch's own optimizers use the foreach operations below; torch just does not list them.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from speed_kernels import contract
from speed_kernels.adamw_ema import op
from speed_kernels.adamw_ema.layout import Ema
from speed_kernels.adamw_ema.optimizer import AdamWEMA
from torch import Tensor

from benchmarks.harness.measure import Unavailable

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.999), 1e-8, 0.01, 1.0
COMPILE_MODES = {"flat": ("default", "max-autotune-no-cudagraphs"), "list": ("default",)}


@dataclass(frozen=True)
class Problem:
    """Weights with gradients. `grads` are bfloat16 in recipe mixed, else the very `.grad` of the weights."""

    params: list[Tensor]
    grads: list[Tensor]
    copies: list[Tensor]  # bfloat16 weights of recipe mixed, else empty
    mixed: bool
    decay: float = 0.9999

    @property
    def device(self) -> torch.device:
        return self.params[0].device


@dataclass(frozen=True)
class Stepper:
    """One step, and the EMA it keeps (a function, because ours exists after the first step only).

    after_capture: to be called between the capture of `step` and its first replay.
    """

    step: Callable[[], object]
    emas: Callable[[], Sequence[Tensor]]
    facts: dict[str, Any]
    after_capture: Callable[[], object] = lambda: None


def dit_shapes(depth: int, width: int) -> list[tuple[int, ...]]:
    """Shapes of a DiT's weights (W. Peebles and S. Xie 2023), 2x2 patches of 4 channels, 1000 classes, 256 tokens."""
    w = width
    shapes: list[tuple[int, ...]] = [(w, 4, 2, 2), (w,), (w, 256), (w,), (w, w), (w,), (1001, w)]
    for _ in range(depth):
        shapes += [(3 * w, w), (3 * w,), (w, w), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
        shapes += [(6 * w, w), (6 * w,)]
    return [*shapes, (2 * w, w), (2 * w,), (32, w), (32,)]


def make_problem(
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    form: Literal["list", "flat"],
    mixed: bool,
    decay: float = 0.9999,
) -> Problem:
    """Weights of N(0, 0.02^2), as separate tensors or as one flat buffer, and gradients of N(0, 1e-3^2)."""
    if form == "flat":
        shapes = [(sum(torch.Size(shape).numel() for shape in shapes),)]
    params = [torch.empty(shape, device=device).normal_(0.0, 0.02) for shape in shapes]
    for param in params:
        param.requires_grad_()
        param.grad = torch.empty_like(param).normal_(0.0, 1e-3)
    grads = [grad_of(param) for param in params]
    copies: list[Tensor] = []
    if mixed:
        grads = [grad.bfloat16() for grad in grads]
        copies = [param.detach().bfloat16() for param in params]
    return Problem(params, grads, copies, mixed, decay)


def num_bytes(num_params: int, mixed: bool) -> int:
    """Least traffic: weights, two moments and EMA read and written, the gradient read once (mixed: bfloat16, twice,
    the norm before the update) and the bfloat16 copy written."""
    return num_params * (32 + (2 + 2 + 2 if mixed else 4))


def grad_of(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def torch_adamw(params: Sequence[Tensor], **how: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **how)


# ------------------------------------------------------------------ the rivals


def reference(problem: Problem) -> Stepper:
    """As trainers write it: per-tensor AdamW, and an EMA over two dictionaries of named parameters."""
    optimizer = torch_adamw(problem.params, foreach=False)
    emas = clones(problem.params)
    names = [f"blocks.{index}.weight" for index in range(len(emas))]

    @torch.no_grad()
    def average() -> None:
        averages = dict(zip(names, emas, strict=True))
        current = dict(zip(names, problem.params, strict=True))
        for name, param in current.items():
            averages[name].mul_(problem.decay).add_(param.data, alpha=1 - problem.decay)

    def step() -> None:
        if problem.mixed:
            for param, grad in zip(problem.params, problem.grads, strict=True):
                grad_of(param).copy_(grad)
            torch.nn.utils.clip_grad_norm_(problem.params, CLIP, foreach=False)
        optimizer.step()
        average()
        for copy, param in zip(problem.copies, problem.params, strict=bool(problem.copies)):
            copy.copy_(param.detach())

    return Stepper(step, lambda: emas, {})


def around(problem: Problem, optimizer: torch.optim.Optimizer) -> Stepper:
    """`optimizer` between foreach upcast and clipping, and foreach EMA and downcast."""
    emas = clones(problem.params)
    params = [param.detach() for param in problem.params]

    @torch.no_grad()
    def step() -> None:
        if problem.mixed:
            torch._foreach_copy_([grad_of(param) for param in problem.params], problem.grads)
            torch.nn.utils.clip_grad_norm_(problem.params, CLIP, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(emas, params, 1.0 - problem.decay)
        if problem.mixed:
            torch._foreach_copy_(problem.copies, params)

    return Stepper(step, lambda: emas, {})


def eager(problem: Problem) -> Stepper:
    """torch's fused AdamW and foreach operations."""
    return around(problem, torch_adamw(problem.params, fused=True))


def compiled(problem: Problem, mode: str) -> Stepper:
    """torch.compile of the whole step in foreach operations, gradients read as they are."""
    params = [param.detach() for param in problem.params]
    emas = clones(params)
    moments, squares = ([torch.zeros_like(param) for param in params] for _ in range(2))
    steps = torch.zeros((), device=problem.device)

    def update(steps: Tensor) -> None:
        grads = [grad.float() for grad in problem.grads] if problem.mixed else problem.grads
        if problem.mixed:
            norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
            factor = (CLIP / (norm + 1e-6)).clamp(max=1.0)
            grads = torch._foreach_mul(grads, factor)
        steps += 1.0
        correction1 = 1.0 - BETAS[0] ** steps
        correction2 = (1.0 - BETAS[1] ** steps).sqrt()
        torch._foreach_mul_(params, 1.0 - LR * WEIGHT_DECAY)
        torch._foreach_lerp_(moments, grads, 1.0 - BETAS[0])
        torch._foreach_mul_(squares, BETAS[1])
        torch._foreach_addcmul_(squares, grads, grads, 1.0 - BETAS[1])
        denominators = torch._foreach_div(torch._foreach_sqrt(squares), correction2)
        torch._foreach_add_(denominators, EPS)
        updates = torch._foreach_div(moments, denominators)
        torch._foreach_mul_(updates, -LR / correction1)
        torch._foreach_add_(params, updates)
        torch._foreach_lerp_(emas, params, 1.0 - problem.decay)
        if problem.mixed:
            torch._foreach_copy_(problem.copies, params)

    fast = torch.compile(update, mode=mode, dynamic=False, fullgraph=True)
    return Stepper(torch.no_grad()(lambda: fast(steps)), lambda: emas, {"compile_mode": mode})


def apex(problem: Problem) -> Stepper:
    """NVIDIA apex FusedAdam and a foreach EMA. Raises Unavailable."""
    if problem.device.type != "cuda":
        raise Unavailable("apex FusedAdam runs on CUDA devices only")
    if importlib.util.find_spec("apex") is None or not importlib.util.find_spec("apex.optimizers"):
        raise Unavailable(
            "NVIDIA apex is not installed (the package `apex` on PyPI is another one)"
        )
    module: Any = importlib.import_module("apex.optimizers")
    optimizer = module.FusedAdam(
        problem.params,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        adam_w_mode=True,
        set_grad_none=False,
    )
    return around(problem, optimizer)


def deepspeed(problem: Problem) -> Stepper:
    """DeepSpeed FusedAdam and a foreach EMA. Raises Unavailable."""
    if problem.device.type != "cuda":
        raise Unavailable("DeepSpeed FusedAdam runs on CUDA devices only")
    if importlib.util.find_spec("deepspeed") is None:
        raise Unavailable("DeepSpeed is not installed")
    module: Any = importlib.import_module("deepspeed.ops.adam")
    try:
        optimizer = module.FusedAdam(
            problem.params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
        )
    except Exception as error:  # its CUDA code is compiled now, with whatever compiler there is
        raise Unavailable(
            f"DeepSpeed cannot build FusedAdam: {str(error).splitlines()[0]}"
        ) from error
    return around(problem, optimizer)


def ours(problem: Problem) -> Stepper:
    """AdamWEMA; in recipe mixed over masters, from the gradients of their bf16 copies."""
    choice = contract.choose(op.NAME, problem.device)
    if choice.fallback:
        raise Unavailable(choice.reason)
    masters: Sequence[Tensor] = problem.params
    if problem.mixed:  # a master has no gradient of its own: it takes that of its copy
        masters = [param.detach() for param in problem.params]
        for copy, grad in zip(problem.copies, problem.grads, strict=True):
            copy.grad = grad
    optimizer = AdamWEMA(
        masters,
        LR,
        BETAS,
        EPS,
        WEIGHT_DECAY,
        ema=Ema("constant", problem.decay),
        clip_norm=CLIP if problem.mixed else 0.0,
        guard=problem.mixed,
        copies=dict(zip(masters, problem.copies, strict=True)) if problem.mixed else None,
    )
    return Stepper(
        optimizer.step,
        lambda: [ema for _, ema in optimizer.ema_parameters()],
        {"backend": choice.backend},
        optimizer.refresh,
    )
