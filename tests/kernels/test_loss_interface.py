"""The loss op as a torch citizen: autograd, opcheck, compile, refusals. What it computes is in test_loss.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_kernels.loss.op import diffusion_loss, loss_op, sample_inputs
from speed_kernels.noise.op import noise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
if torch.cuda.is_available():
    BACKENDS += [("triton", "cuda")]
CASES = range(len(list(sample_inputs())))
NAMES = ("out", "x0", "row_B", "rows_T8", "address_2")

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def to(device: str, *values: Any) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


def tensors(device: str = "cpu") -> tuple[Tensor, ...]:
    """out (which requires a gradient), x0, rows, table and address of a case with a learned variance."""
    out, *rest = to(device, *next(sample_inputs())[:5])
    return (out.clone().requires_grad_(), *rest)


@every_backend
def test_backward_scales_by_the_upstream_gradient_unless_told_it_is_one(
    backend: str, device: str
) -> None:
    gradients = []
    for factor, unit_upstream in ((1.0, False), (3.0, False), (3.0, True)):
        out, *rest = tensors(device)
        total, losses = diffusion_loss(
            out, *rest, seed=5, learned_variance=True, unit_upstream=unit_upstream, backend=backend
        )
        assert total.requires_grad and not losses.requires_grad
        (factor * total).backward()
        assert out.grad is not None
        gradients.append(out.grad)
    base, scaled, promised = gradients
    torch.testing.assert_close(scaled, 3.0 * base)
    assert torch.equal(promised, base)


@every_backend
def test_gradient_of_the_prediction_ignores_the_variational_term(backend: str, device: str) -> None:
    gradients = []
    for vb_scale in (1.0, 0.0):
        out, *rest = tensors(device)
        total, _ = diffusion_loss(
            out, *rest, seed=5, learned_variance=True, vb_scale=vb_scale, backend=backend
        )
        total.backward()
        assert out.grad is not None
        gradients.append(out.grad.chunk(2, dim=1))
    (prediction, variance), (same, nothing) = gradients
    assert torch.equal(prediction, same)
    assert (variance != 0).all() and (nothing == 0).all()


@every_backend
def test_default_is_the_mean_of_the_batch(backend: str, device: str) -> None:
    total, losses = diffusion_loss(*tensors(device), seed=5, learned_variance=True, backend=backend)
    torch.testing.assert_close(total.detach(), losses[0].mean())
    assert total.dtype == losses.dtype == torch.float32 and total.shape == ()


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_opcheck(backend: str, device: str, case: int) -> None:
    args = to(device, *list(sample_inputs())[case][:-1], backend)
    torch.library.opcheck(loss_op, (args[0].requires_grad_(), *args[1:]))


class Counted(TorchDispatchMode):
    """Counts the tensor operations that write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@every_backend
def test_the_backward_pass_runs_nothing(backend: str, device: str) -> None:
    """The gradient is there already: no product with 1, no zeros for outputs that have no gradient."""
    out, *rest = tensors(device)
    total, _ = diffusion_loss(
        out, *rest, seed=5, learned_variance=True, unit_upstream=True, backend=backend
    )
    one = torch.ones((), device=device)
    with Counted() as counted:
        torch.autograd.grad(total, out, one)
    assert set(counted.names) <= {"detach"}


@every_backend
def test_a_kept_ticket_is_left_at_zero_and_changes_nothing(backend: str, device: str) -> None:
    """Batches of several sizes share one ticket; opcheck sees that it is not changed."""
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    out, x0, row_B, *rest = tensors(device)
    for batch in (out.shape[0], 1, out.shape[0]):
        args = (out[:batch], x0[:batch], row_B[:batch], *rest)
        options = {"seed": 5, "learned_variance": True, "backend": backend}
        with_ticket = diffusion_loss(*args, **options, ticket=ticket)
        without = diffusion_loss(*args, **options)
        assert all(map(torch.equal, with_ticket, without))
        assert ticket.item() == 0
    args = (out.detach(), x0, row_B, *rest, 5, True, 1.0, False, 0.5, backend, True, ticket)
    torch.library.opcheck(loss_op, args)


@every_backend
@pytest.mark.parametrize("unit_upstream", [True, False])
def test_compiles_without_a_graph_break(backend: str, device: str, unit_upstream: bool) -> None:
    def step(out: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return diffusion_loss(
            2.0 * out,
            *rest,
            seed=5,
            learned_variance=True,
            unit_upstream=unit_upstream,
            backend=backend,
        )

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out, *rest = tensors(device)
        total, losses = function(out, *rest)
        total.backward()
        results.append((total, losses, out.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_follows_the_address() -> None:
    """Noise and loss in a CUDA graph: a replay reads step and slot from the device, as an eager call does."""
    cdf = torch.arange(1, 1001, device="cuda") * (2**32 // 1000)
    cdf[-1] = 2**32
    rows, tau = torch.rand(1000, 8, device="cuda"), torch.rand(1000, device="cuda")
    x0, address = (
        torch.randn(8, 4, 32, 32, device="cuda"),
        torch.zeros(2, dtype=torch.int64, device="cuda"),
    )

    def step() -> tuple[Tensor, ...]:
        x_t, row_B, time_B = noise(
            x0, cdf, rows, tau, address, seed=3, num_slots=64, backend="triton"
        )
        out = torch.cat((x_t, x_t), 1)
        total, losses = diffusion_loss(
            out, x0, row_B, rows, address, seed=3, learned_variance=True, backend="triton"
        )
        return x_t, row_B, time_B, total, losses

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for index in range(3):
        address.copy_(torch.tensor([index, 8 * index]))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)


Change = Callable[[dict[str, Any]], Any]
REFUSALS: list[tuple[str, Change]] = [
    ("out is torch.float64", lambda a: a.update(out=a["out"].double())),
    ("out has the shape", lambda a: a.update(out=a["out"][:, :3])),
    ("learned_variance=False ask for", lambda a: a.update(learned_variance=False)),
    ("row_B is torch.int32", lambda a: a.update(row_B=a["row_B"].int())),
    (r"row_B is torch.int64 \(2,\)", lambda a: a.update(row_B=a["row_B"][1:])),
    ("row_B is on meta", lambda a: a.update(row_B=a["row_B"].to("meta"))),
    ("rows_T8 is torch.float64", lambda a: a.update(rows_T8=a["rows_T8"].double())),
    ("ticket is torch.int64", lambda a: a.update(ticket=torch.zeros(1, dtype=torch.int64))),
    (r"ticket is torch.int32 \(2,\)", lambda a: a.update(ticket=torch.zeros(2, dtype=torch.int32))),
    ("seed=-3", lambda a: a.update(seed=-3)),
    ("needs a channel dimension", lambda a: a.update(out=torch.zeros(4), x0=torch.zeros(4))),
]


@pytest.mark.parametrize(("message", "change"), REFUSALS)
def test_wrong_arguments_are_refused(message: str, change: Change) -> None:
    arguments: dict[str, Any] = dict(zip(NAMES, tensors(), strict=True))
    arguments |= {"seed": 1, "learned_variance": True}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        diffusion_loss(**arguments, backend="cpp")


def test_an_upstream_of_one_is_seen_each_time() -> None:
    """On a CPU a gradient times 1 is not multiplied; another upstream, on the same graph, is."""
    out, *rest = tensors("cpu")
    total, _ = diffusion_loss(out, *rest, seed=5, learned_variance=True, backend="cpp")
    one, two, again = (
        torch.autograd.grad(total, out, torch.tensor(each), retain_graph=True)[0]
        for each in (1.0, 2.0, 1.0)
    )
    assert torch.equal(one, again) and torch.equal(two, 2 * one) and one.abs().sum() > 0
