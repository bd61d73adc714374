"""Plain eager calls go past torch's dispatcher; whoever traces, transforms or watches still meets the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_kernels.attention import sdpa
from speed_kernels.bias_gelu import op as gelu
from speed_kernels.dispatch import direct
from speed_kernels.dropout import op as dropout
from speed_kernels.gate_residual_norm_modulate import op as norm
from speed_kernels.group_norm_silu import op as group_norm
from speed_kernels.loss import op as loss
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile


def leaves(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a
        for a in args
    )


def gelu_call(args: tuple[Any, ...]) -> Tensor:
    x, bias, backend = args
    return gelu.bias_gelu(x, bias, backend=backend)


def gated_call(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    x, branch, gate, bias, shift, scale, eps, backend = args
    return norm.gate_residual_norm_modulate(
        x, branch, gate, shift, scale, bias_D=bias, eps=eps, backend=backend
    )


def normed_call(args: tuple[Any, ...]) -> Tensor:
    x, _, _, _, shift, scale, eps, backend = args
    return norm.norm_modulate(x, shift, scale, eps=eps, backend=backend)


def dropout_call(args: tuple[Any, ...]) -> Tensor:
    x, address, layer, p, backend = args
    return dropout.dropout(x, address, layer=layer, p=p, backend=backend)


def group_norm_call(args: tuple[Any, ...]) -> Tensor:
    x, weight, bias, num_groups, eps, silu, backend = args
    return group_norm.group_norm_silu(
        x, weight, bias, num_groups=num_groups, eps=eps, silu=silu, backend=backend
    )


def loss_call(args: tuple[Any, ...]) -> Tensor:
    out, x0, row_B, rows, address, seed, learned, vb, weight_vb, scale, backend = args
    fixed = (x0.detach(), row_B, rows.detach(), address)
    return loss.diffusion_loss(
        out, *fixed, seed=seed, learned_variance=learned, vb_scale=vb, weight_vb=weight_vb,
        grad_scale=scale, backend=backend,
    )[0]  # fmt: skip


CALLS: list[tuple[Callable[..., Any], Callable[..., Any], str]] = [
    (gelu_call, gelu.sample_inputs, "speed_kernels::bias_gelu"),
    (gated_call, norm.sample_inputs, "speed_kernels::gate_residual_norm_modulate"),
    (normed_call, norm.sample_inputs, "speed_kernels::norm_modulate"),
    (loss_call, loss.sample_inputs, "speed_kernels::loss"),
    (dropout_call, dropout.sample_inputs, "speed_kernels::dropout"),
    (group_norm_call, group_norm.sample_inputs, "speed_kernels::group_norm_silu"),
]
every_call = pytest.mark.parametrize(
    ("call", "samples", "name"), CALLS, ids=[name.split("::")[1] for _, _, name in CALLS]
)


def grads(call: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Results and gradients of their weighted sums."""
    results = call(args)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    total = torch.stack([(r.float() * 0.3).sum() for r in results]).sum()
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [r.detach() for r in results] + [g for g in found if g is not None]


@every_call
def test_both_ways_give_the_same_bits(call: Any, samples: Any, name: str) -> None:
    """Under a profiler the op is called by its name, and gives what the direct call gives."""
    for args in samples("cpu", "cpp"):
        plain = grads(call, leaves(args))
        with profile() as watched:
            op = grads(call, leaves(args))
        assert any(event.key == name for event in watched.key_averages())
        assert all(torch.equal(a, b) for a, b in zip(plain, op, strict=True))


@every_call
def test_there_is_no_second_derivative(call: Any, samples: Any, name: str) -> None:
    args = leaves(next(iter(samples("cpu", "cpp"))))
    result = call(args)
    result = result[0] if isinstance(result, tuple) else result
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    found = torch.autograd.grad(result.sum(), wanted, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError):
        sum(g.sum() for g in found if g is not None).backward()  # pyright: ignore


def test_what_is_not_plain() -> None:
    assert direct(torch.ones(1)) and direct(torch.nn.Parameter(torch.ones(1)))
    assert not direct(torch.ones(1, device="meta"))
    with torch._subclasses.FakeTensorMode():
        assert not direct(torch.ones(1))
    torch.func.vmap(lambda x: (x, direct(x))[0])(torch.ones(2))
    seen: list[bool] = []
    torch.func.grad(lambda x: (seen.append(direct(x)), x.sum())[1])(torch.ones(2))
    assert seen == [False]


def test_one_attention_kernel_is_named_as_torch_names_it() -> None:
    """The quick switch sets what torch's own context manager sets, and puts it back."""

    def enabled() -> list[bool]:
        return [bool(is_on()) for _, is_on, _ in sdpa._Only.switches]

    before = enabled()
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(kernel):
            theirs = enabled()
        with sdpa._Only(kernel):
            assert enabled() == theirs
        assert enabled() == before
