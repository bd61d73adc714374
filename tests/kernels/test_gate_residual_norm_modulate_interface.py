"""The gated norm as a torch citizen: opcheck, compile, CUDA graphs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_kernels import contract
from speed_kernels.gate_residual_norm_modulate.op import (
    NAME,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_backward_op,
    gate_residual_norm_modulate_op,
    norm_modulate,
    norm_modulate_backward_op,
    norm_modulate_op,
    sample_inputs,
)
from torch import Tensor

BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
if torch.cuda.is_available():
    BACKENDS += [("triton", "cuda")]
CASES = range(len(list(sample_inputs())))

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def case(index: int, backend: str, device: str) -> tuple[Any, ...]:
    return list(sample_inputs(device, backend))[index]


def leaves(*values: Any) -> tuple[Any, ...]:
    """The same strides, each tensor to be differentiated by."""
    return tuple(v.detach().requires_grad_() if isinstance(v, Tensor) else v for v in values)


@every_backend
@pytest.mark.parametrize("index", CASES)
def test_opcheck(backend: str, device: str, index: int) -> None:
    args = case(index, backend, device)
    torch.library.opcheck(gate_residual_norm_modulate_op, leaves(*args))


@every_backend
@pytest.mark.parametrize("index", [1, 4, 5])
def test_opcheck_of_the_other_three(backend: str, device: str, index: int) -> None:
    x, branch, gate, bias, shift, scale, eps, _ = case(index, backend, device)
    normed = leaves(x, shift, scale, eps, backend)
    torch.library.opcheck(norm_modulate_op, normed)
    y, mean, rstd = norm_modulate_op(x, shift, scale, eps, backend)
    torch.library.opcheck(norm_modulate_backward_op, (y, x, mean, rstd, scale, backend))
    for d_sum in (None, x):
        args = (d_sum, y, x, mean, rstd, branch, gate, bias, scale, backend)
        torch.library.opcheck(gate_residual_norm_modulate_backward_op, args)


@every_backend
@pytest.mark.parametrize("use_sum", [True, False])
def test_compiles_without_a_graph_break(backend: str, device: str, use_sum: bool) -> None:
    """Two ops in a row, as in a network, with the modulation cut from one product inside the graph."""

    def step(x: Tensor, branch: Tensor, wide: Tensor, bias: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2 = wide.chunk(5, 1)
        y = norm_modulate(x, shift, scale, backend=backend)
        stream, z = gate_residual_norm_modulate(
            x, y * branch, gate, shift_2, scale_2, bias_D=bias, backend=backend
        )
        return (z.float() ** 2).sum() + (stream.float() ** 3).sum() * use_sum

    x, branch, _, bias, *_ = case(1, backend, device)
    wide = torch.randn(x.shape[0], 5 * x.shape[2], device=device).to(branch.dtype)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = leaves(x, branch, wide, bias)
        total = function(*inputs)
        total.backward()
        results.append((total.detach(), *(leaf.grad for leaf in inputs)))
    assert all(map(torch.equal, *results))


@every_backend
def test_only_what_is_asked_for_has_a_gradient(backend: str, device: str) -> None:
    x, branch, gate, bias, shift, scale, eps, _ = case(0, backend, device)
    branch.requires_grad_()
    stream, y, mean, rstd = gate_residual_norm_modulate_op(
        x, branch, gate, bias, shift, scale, eps, backend
    )
    assert stream.requires_grad and y.requires_grad
    assert not mean.requires_grad and not rstd.requires_grad
    assert mean.dtype == rstd.dtype == torch.float32 and mean.shape == x.shape[:2]
    y.sum().backward()
    assert branch.grad is not None and x.grad is None and gate.grad is None


def test_eps_reaches_every_backend() -> None:
    x, _, _, _, shift, scale, *_ = case(0, "cpp", "cpu")
    small = 1e-3 * x
    results = [
        norm_modulate(small, shift, scale, eps=eps, backend=backend)
        for eps in (1e-6, 1e-2)
        for backend in ("reference", "cpp")
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[2], results[3])
    assert not torch.allclose(results[0], results[2])


def test_the_contract_chooses_it() -> None:
    assert contract.backends(NAME) == ["triton", "cpp", "reference"]
    assert contract.choose(NAME, "cpu").backend in ("cpp", "reference")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_pass_gives_what_an_eager_one_gives() -> None:
    args = leaves(*case(1, "triton", "cuda"))
    x, branch, gate, bias, shift, scale, *_ = args

    def step() -> tuple[Tensor, ...]:
        stream, y = gate_residual_norm_modulate(
            x, branch, gate, shift, scale, bias_D=bias, backend="triton"
        )
        inputs = (x, branch, gate, bias, shift, scale)
        return stream, y, *torch.autograd.grad((stream.sum() + y.float().sum()), inputs)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert all(map(torch.equal, captured, step()))


Change = Callable[[dict[str, Any]], Any]
REFUSALS: list[tuple[str, Change]] = [
    ("x_BTD has the shape", lambda a: a.update(x_BTD=a["x_BTD"][0])),
    ("x_BTD is torch.float16", lambda a: a.update(x_BTD=a["x_BTD"].half())),
    ("shift_BD is torch.float64", lambda a: a.update(shift_BD=a["shift_BD"].double())),
    ("branch_BTD has the shape", lambda a: a.update(branch_BTD=a["branch_BTD"][:, 1:])),
    ("branch_BTD is torch.float32", lambda a: a.update(branch_BTD=a["branch_BTD"].float())),
    ("gate_BD has the shape", lambda a: a.update(gate_BD=a["gate_BD"][:, None])),
    ("scale_BD is on meta", lambda a: a.update(scale_BD=a["scale_BD"].to("meta"))),
    (r"bias_D has the shape \(23,\)", lambda a: a.update(bias_D=a["bias_D"][1:])),
    ("eps=0.0", lambda a: a.update(eps=0.0)),
    ("eps=inf", lambda a: a.update(eps=float("inf"))),
]


@pytest.mark.parametrize(("message", "change"), REFUSALS)
def test_wrong_arguments_are_refused(message: str, change: Change) -> None:
    x, branch, gate, bias, shift, scale, *_ = case(1, "cpp", "cpu")
    arguments: dict[str, Any] = {
        "x_BTD": x, "branch_BTD": branch, "gate_BD": gate, "shift_BD": shift, "scale_BD": scale, "bias_D": bias,
    }  # fmt: skip
    change(arguments)
    with pytest.raises(ValueError, match=message):
        gate_residual_norm_modulate(**arguments, backend="cpp")
