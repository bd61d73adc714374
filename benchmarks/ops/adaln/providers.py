"""Single ops of a DiT block and their rivals: gate + residual + norm + modulate, bias + GELU, attention.

An op's provider is a function from the op's inputs to its outputs, differentiable by torch. Whoever needs a bias or its
gradient pays what a network would make it pay: plain torch adds the bias of GELU's input inside the matrix product
before, for nothing, and sums its gradient in a pass of its own; a compiler and our kernel do both in theirs.
"""

# Shape suffixes: B samples, T tokens, D channels, R rows, N heads, K size of a head.

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from speed_kernels import contract
from speed_kernels.attention import op as attention_op
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.measure import Unavailable

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]
EPS = 1e-6
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Problem:
    """One op on given inputs.

    inputs require gradients and are what kernels get; grads are d loss / d output. `summed`: the input whose gradient
    plain torch sums over all rows to get a bias's, None where there is none.
    """

    op: str
    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    truth: Function  # in float64, for the gate
    summed: int | None = None

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""
        inputs = tuple(each.detach().to(dtype).requires_grad_() for each in self.inputs)
        grads = tuple(each.to(dtype) for each in self.grads)
        return Problem(self.op, inputs, grads, self.truth, self.summed)


def forward_bytes(problem: Problem) -> int:
    """Every large input read once, every output written once (the outputs look like the gradients)."""
    return _bytes(problem.inputs) + _bytes(problem.grads)


def backward_bytes(problem: Problem) -> int:
    """What the forward pass kept and the gradients read once, the inputs' gradients written once."""
    kept = _bytes(problem.inputs)
    if (
        problem.op == "gate_residual_norm_modulate"
    ):  # it keeps the sum instead of x, of the same size
        return kept + _bytes(problem.grads) + kept
    if problem.op == "attention":  # and its output
        return kept + 2 * _bytes(problem.grads) + kept
    return kept + _bytes(problem.grads) + kept


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _leaf(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return tensor.to(device=device, dtype=dtype).requires_grad_()


def _normal(*shape: int, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


# ------------------------------------------------------------------ gate, residual, norm, modulate


def plain_glue(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
    """(sum [B, T, D], y [B, T, D]) as public trainers write it, y in the branch's dtype."""
    total = x + gate.unsqueeze(1) * branch
    normed = F.layer_norm(total, total.shape[-1:], eps=EPS)
    return total, (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(branch.dtype)


def glue_problem(
    batch: int,
    tokens: int,
    width: int,
    stream: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
) -> Problem:
    """x in `stream`, the rest in `compute`; no bias: nobody's would cost the same."""
    large = [_normal(batch, tokens, width, seed=seed, device=device) for seed in range(4)]
    small = [0.5 * _normal(batch, width, seed=seed, device=device) for seed in range(4, 7)]
    x, branch = _leaf(large[0], stream, device), _leaf(large[1], compute, device)
    rows = [_leaf(each, compute, device) for each in small]
    grads = (large[2].to(stream), large[3].to(compute))
    return Problem("gate_residual_norm_modulate", (x, branch, *rows), grads, plain_glue)


def ours_glue(problem: Problem) -> Function:
    """Our kernel. Raises Unavailable."""
    backend = _backend(problem)
    op: Any = importlib.import_module("speed_kernels.gate_residual_norm_modulate.op")
    return lambda x, branch, gate, shift, scale: op.gate_residual_norm_modulate(
        x, branch, gate, shift, scale, eps=EPS, backend=backend
    )


def apex_glue(problem: Problem) -> Function:
    """NVIDIA apex's FusedLayerNorm between plain gate and modulation. Raises Unavailable."""
    _cuda_only("apex", problem)
    if importlib.util.find_spec("apex") is None or not importlib.util.find_spec(
        "apex.normalization"
    ):
        raise Unavailable(
            "NVIDIA apex is not installed (the package `apex` on PyPI is another one)"
        )
    module: Any = importlib.import_module("apex.normalization")
    width = problem.inputs[0].shape[-1]
    try:
        norm = module.FusedLayerNorm(width, eps=EPS, elementwise_affine=False).to(problem.device)
    except Exception as error:  # built without its CUDA code, or for another torch
        raise Unavailable(f"apex cannot run FusedLayerNorm: {_first_line(error)}") from error
    return _around(norm)


def liger_glue(problem: Problem) -> Function:
    """Liger-Kernel's LayerNorm, whose weight and bias are fixed here, between plain gate and modulation."""
    _cuda_only("Liger-Kernel", problem)
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("Liger-Kernel is not installed")
    module: Any = importlib.import_module("liger_kernel.ops.layer_norm")
    x = problem.inputs[0]
    one, zero = (
        make(x.shape[-1], device=x.device, dtype=x.dtype) for make in (torch.ones, torch.zeros)
    )
    return _around(lambda total: module.LigerLayerNormFunction.apply(total, one, zero, EPS))


def _around(norm: Callable[[Tensor], Tensor]) -> Function:
    def glue(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        total = x + gate.unsqueeze(1) * branch
        y = norm(total) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return total, y.to(branch.dtype)

    return glue


# ------------------------------------------------------------------ bias and GELU


def plain_gelu(x: Tensor, bias: Tensor) -> Outputs:
    """gelu(x + bias) as one expression: the truth, and what a compiler gets."""
    return (F.gelu(x + bias, approximate="tanh"),)


def after_product(x: Tensor, bias: Tensor) -> Outputs:
    """GELU alone: the product before has added the bias. Its input is x without bias here, which costs the same."""
    return (F.gelu(x, approximate="tanh"),)


def gelu_problem(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """x [R, D] and a bias [D]."""
    x = _leaf(2.0 * _normal(rows, width, seed=0, device=device), dtype, device)
    bias = _leaf(_normal(width, seed=1, device=device), dtype, device)
    grad = _normal(rows, width, seed=2, device=device).to(dtype)
    return Problem("bias_gelu", (x, bias), (grad,), plain_gelu, summed=0)


def ours_gelu(problem: Problem) -> Function:
    """Our kernel. Raises Unavailable."""
    backend = _backend(problem)
    op: Any = importlib.import_module("speed_kernels.bias_gelu.op")
    return lambda x, bias: (op.bias_gelu(x, bias, backend=backend),)


# ------------------------------------------------------------------ attention


def plain_attention(qkv_BT3NK: Tensor) -> Outputs:
    """The definition: the matrix of scores is stored."""
    return (attention_op.reference(qkv_BT3NK),)


def attention_problem(
    batch: int, tokens: int, heads: int, head: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """q, k and v as they lie in one product's output [B, T, 3, N, K]."""
    qkv = _leaf(_normal(batch, tokens, 3, heads, head, seed=0, device=device), dtype, device)
    grad = _normal(batch, tokens, heads, head, seed=1, device=device).to(dtype)
    return Problem("attention", (qkv,), (grad,), plain_attention)


def sdpa(problem: Problem, name: str) -> Function:
    """torch's attention held to one of its kernels."""

    def attend(qkv_BT3NK: Tensor) -> Outputs:
        q, k, v = qkv_BT3NK.permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(BACKENDS[name]):
            return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2),)

    return _probed(attend, problem, name)


def xformers(problem: Problem) -> Function:
    """xformers' memory_efficient_attention. Raises Unavailable."""
    head = problem.inputs[0].shape[-1]
    try:
        attention_op.choose_attention(problem.device, "xformers", head_dim=head)
    except contract.BackendError as error:
        raise Unavailable(str(error).split("cannot run: ", 1)[-1]) from error
    attend = attention_op.implementation("xformers")
    return _probed(lambda qkv: (attend(qkv),), problem, "xformers")


def ours_attention(problem: Problem) -> Function:
    """Whatever the engine takes on this device."""
    head = problem.inputs[0].shape[-1]
    choice = attention_op.choose_attention(problem.device, head_dim=head)
    attend = attention_op.implementation(choice.backend)
    return lambda qkv: (attend(qkv),)


def _probed(function: Function, problem: Problem, name: str) -> Function:
    """`function`, if it can run forward and backward on one sample."""
    few = tuple(each[:1].detach().clone().requires_grad_() for each in problem.inputs)
    try:
        torch.autograd.grad(function(*few), few, tuple(each[:1] for each in problem.grads))
    except Exception as error:  # no kernel for this head, dtype or device
        raise Unavailable(f"{name} cannot run here: {_first_line(error)}") from error
    return function


# ------------------------------------------------------------------ who there is

EAGER: dict[str, Function] = {"gate_residual_norm_modulate": plain_glue, "bias_gelu": after_product}
PROVIDERS = {
    "gate_residual_norm_modulate": ("reference", "eager", "compile", "apex", "liger", "ours"),
    "bias_gelu": ("reference", "eager", "compile", "ours"),
    "attention": ("reference", *BACKENDS, "xformers", "ours"),
}
OTHERS: dict[tuple[str, str], Callable[[Problem], Function]] = {
    ("gate_residual_norm_modulate", "apex"): apex_glue,
    ("gate_residual_norm_modulate", "liger"): liger_glue,
    ("gate_residual_norm_modulate", "ours"): ours_glue,
    ("bias_gelu", "ours"): ours_gelu,
    ("attention", "xformers"): xformers,
    ("attention", "ours"): ours_attention,
    **{("attention", name): lambda problem, name=name: sdpa(problem, name) for name in BACKENDS},
}


def function_of(problem: Problem, provider: str) -> Function:
    """The provider's function; `reference` (on a problem cast to float32) and `eager` are plain torch."""
    if (problem.op, provider) in OTHERS:
        return OTHERS[problem.op, provider](problem)
    return EAGER.get(problem.op, problem.truth)


def _backend(problem: Problem) -> str:
    """The fastest backend of our op. Raises Unavailable where there is only a slower one."""
    if problem.op not in contract.ops():
        raise Unavailable(f"this commit has no op {problem.op}")
    choice = contract.choose(problem.op, problem.device)
    if choice.fallback:
        raise Unavailable(choice.reason)
    return choice.backend


def _cuda_only(name: str, problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise Unavailable(f"{name} runs on CUDA devices only")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
