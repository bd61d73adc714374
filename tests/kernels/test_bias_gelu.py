"""The bias_gelu op against torch's GELU and its autograd in float64."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from speed_kernels import contract
from speed_kernels.bias_gelu import cpp_cpu, reference
from speed_kernels.bias_gelu.op import (
    bias_gelu,
    bias_gelu_backward_op,
    bias_gelu_op,
    sample_inputs,
)
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
CASES = range(len(list(sample_inputs())))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def to(device: str, *values: Any) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(backend: str, device: str, x: Tensor, bias_D: Tensor | None, d_y: Tensor) -> list[Tensor]:
    """y, d_x and, with a bias, d_bias of the op by autograd, on the CPU."""
    x, bias_D, d_y = to(device, x, bias_D, d_y)
    leaves = [x.detach().requires_grad_()]
    if bias_D is not None:
        leaves.append(bias_D.detach().requires_grad_())
    y = bias_gelu(leaves[0], leaves[1] if bias_D is not None else None, backend=backend)
    return [tensor.detach().cpu() for tensor in (y, *torch.autograd.grad(y, leaves, d_y))]


def exact(x: Tensor, bias_D: Tensor | None, d_y: Tensor) -> list[Tensor]:
    """The same from torch's own GELU, in float64."""
    leaves = [x.double().requires_grad_()]
    u = leaves[0]
    if bias_D is not None:
        leaves.append(bias_D.double().requires_grad_())
        u = u + leaves[1]
    y = F.gelu(u, approximate="tanh")
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y.double())]


def assert_within(got: Tensor, expected: Tensor, slack: Tensor | float) -> None:
    """`got` within `slack` of `expected` before it was rounded to its dtype."""
    kind = torch.finfo(got.dtype)
    # The interpreter cuts bits off where a GPU rounds.
    unit = kind.eps if INTERPRETING and got.dtype == torch.bfloat16 else kind.eps / 2
    rounding = unit * (expected.abs() + slack) + kind.smallest_normal * kind.eps
    error = (got.double() - expected.double()).abs()
    assert (error <= slack + rounding).all(), f"{(error / (slack + rounding)).max()} times too far"


def assert_agree(got: list[Tensor], x: Tensor, bias_D: Tensor | None, d_y: Tensor) -> None:
    """The op's promise. Torch's float64 has an absolute error of 2^-52 in 1 + tanh."""
    expected = exact(x, bias_D, d_y)
    u = x.double() if bias_D is None else x.double() + bias_D.double()
    q = 2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
    bound = 2.0**-21 * (1 + q.abs() / 2) * expected[0].abs() + 2.0**-48 * (1 + u.abs())
    assert_within(got[0], expected[0], bound)
    assert_within(got[1], expected[1], 2.0**-21 * d_y.double().abs())
    if bias_D is not None:
        columns = d_y.double().abs().unsqueeze(0).flatten(0, -2).sum(0)
        assert_within(got[2], expected[2], 2.0**-21 * columns)


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_sample_inputs_are_right(backend: str, device: str, case: int) -> None:
    x, bias_D, _ = list(sample_inputs())[case]
    d_y = normal(*x.shape, seed=1).to(x.dtype)
    got = run(backend, device, x, bias_D, d_y)
    for tensor, like in zip(got, (x, x, bias_D), strict=False):
        assert like is not None
        assert tensor.dtype == like.dtype and tensor.shape == like.shape and tensor.is_contiguous()
    assert_agree(got, x, bias_D, d_y)


@every_backend
@pytest.mark.parametrize("num_columns", [1, 3, 8, 511, 513, 1536, 3072, 4096, 4608])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths(backend: str, device: str, num_columns: int, dtype: torch.dtype) -> None:
    if INTERPRETING and dtype == torch.bfloat16 and num_columns not in (513, 4608):
        pytest.skip("slow")
    x = normal(3, num_columns, scale=2.0).to(dtype)
    bias_D, d_y = normal(num_columns, seed=1).to(dtype), normal(3, num_columns, seed=2).to(dtype)
    assert_agree(run(backend, device, x, bias_D, d_y), x, bias_D, d_y)


@every_backend
@pytest.mark.parametrize("with_bias", [True, False])
def test_many_runs_of_rows(
    backend: str, device: str, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than one run takes, and more runs than the second sum takes at a time."""
    if backend == "triton":
        monkeypatch.setattr(contract.implementation("bias_gelu", "triton"), "SUM_RUNS", 2)
    x, d_y = normal(7, 111, 24), normal(7, 111, 24, seed=2)
    bias_D = normal(24, seed=1) if with_bias else None
    got = run(backend, device, x, bias_D, d_y)
    assert_agree(got, x, bias_D, d_y)
    assert all(map(torch.equal, got, run(backend, device, x, bias_D, d_y)))


@every_backend
def test_bias_gradient_where_rows_cancel(backend: str, device: str) -> None:
    """Partial sums a million times larger than the result."""
    x = normal(400, 16)
    d_y = 1e6 * normal(400, 16, seed=1)
    x[200:], d_y[200:] = x[:200], -d_y[:200] + 0.125
    bias_D = torch.zeros(16)
    assert_agree(run(backend, device, x, bias_D, d_y), x, bias_D, d_y)


@every_backend
def test_relative_accuracy_of_every_magnitude(backend: str, device: str) -> None:
    """Few units in the last place from 1e-37 on, into the tail where the result leaves float32's normal range."""
    small = torch.logspace(-37, 1, 1000, dtype=torch.float64).float()
    x = torch.cat((small, -small, torch.linspace(-9.9, 9.9, 2000)))
    y, d_x = run(backend, device, x, None, torch.ones_like(x))
    u = x.double()
    q = 2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
    expected = u * torch.sigmoid(q)
    relative = ((y.double() - expected) / expected).abs() * 2.0**23
    assert relative[q.abs() < 1].max() <= 3.0
    assert (relative <= 4.0 * (1 + q.abs() / 2))[u > -9.9].all()
    _, slope, _ = (t.double() for t in exact(x, torch.zeros_like(x), torch.ones_like(x)))
    assert (d_x.double() - slope).abs().max() <= 3.0 * 2.0**-23


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_magnitudes(backend: str, device: str, dtype: torch.dtype) -> None:
    """u, -0 or 0; never not a number where torch has none, and finite gradients where torch has not."""
    largest = torch.finfo(dtype).max
    magnitudes = torch.tensor([10.0, 10.3, 11, 40, 300, 6e4, 1e13, 1.8e19, 1e25, 3e38, math.inf])
    magnitudes = torch.cat((magnitudes.to(dtype), torch.tensor([largest], dtype=dtype)))
    x = torch.cat((magnitudes, -magnitudes, torch.tensor([math.nan], dtype=dtype)))
    y, d_x = run(backend, device, x, None, torch.ones_like(x))
    with_zero = run(backend, device, x, torch.zeros_like(x), torch.ones_like(x))
    torchs = F.gelu(x.float(), approximate="tanh").to(dtype)
    assert torch.equal(y.isnan(), torchs.isnan()) and torch.equal(with_zero[0].isnan(), y.isnan())
    torch.testing.assert_close(y, torchs, rtol=0, atol=1e-35, equal_nan=True)
    finite = x.isfinite()
    slope = (x > 0).to(dtype)
    torch.testing.assert_close(d_x[finite], slope[finite], rtol=0, atol=1e-30)
    torch.testing.assert_close(with_zero[2][finite], slope[finite], rtol=0, atol=1e-30)
    assert d_x[-1].isnan() and with_zero[2][-1].isnan()


@every_backend
def test_an_overflowing_sum_is_as_torch_s(backend: str, device: str) -> None:
    x, bias_D = torch.tensor([[3e38, -3e38, 1.0]]), torch.tensor([3e38, -3e38, math.nan])
    y = run(backend, device, x, bias_D, torch.ones_like(x))[0]
    assert y[0, 0] == math.inf and y[0, 2].isnan()
    if backend != "reference":  # in float64 nothing overflows
        assert y[0, 1].isnan() and F.gelu(x + bias_D, approximate="tanh")[0, 1].isnan()


@every_backend
def test_not_a_number_stays_in_its_row_and_column(backend: str, device: str) -> None:
    x, bias_D, d_y = normal(40, 20), normal(20, seed=1), normal(40, 20, seed=2)
    x[17, 3] = math.nan
    for tensor in run(backend, device, x, bias_D, d_y):
        assert tensor.isnan().sum() == 1
        assert tensor[..., 3].isnan().any()


@every_backend
def test_strided_inputs(backend: str, device: str) -> None:
    x, bias_D, d_y = normal(6, 10, 32), normal(32, seed=1), normal(6, 10, 32, seed=2)
    expected = run(backend, device, x, bias_D, d_y)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.stack((bias_D, bias_D), 1)[:, 0]
    upstream = torch.cat((d_y, d_y), 2)[..., :32]
    assert not (strided.is_contiguous() or spread.is_contiguous() or upstream.is_contiguous())
    for got, wanted in zip(run(backend, device, strided, spread, upstream), expected, strict=True):
        assert torch.equal(got, wanted)
    ones = run(backend, device, x, bias_D, torch.ones_like(x))
    expanded = run(backend, device, x, bias_D, torch.ones(1, device=device).expand(x.shape))
    assert all(map(torch.equal, ones, expanded))


@every_backend
def test_keeps_its_inputs_alone_and_changes_none(backend: str, device: str) -> None:
    values = to(device, normal(50, 37, scale=4), normal(37, seed=1), normal(50, 37, seed=2))
    copies = [tensor.clone() for tensor in values]
    x, bias_D, d_y = values[0].requires_grad_(), values[1].requires_grad_(), values[2]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = bias_gelu(x, bias_D, backend=backend)
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, bias_D))
    first = torch.autograd.grad(y, (x, bias_D), d_y, retain_graph=True)
    again = torch.autograd.grad(y, (x, bias_D), d_y)
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, values, copies))


@every_backend
def test_autocast_changes_nothing(backend: str, device: str) -> None:
    tensors = normal(6, 32), normal(32, seed=1), normal(6, 32, seed=2)
    expected = run(backend, device, *tensors)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = run(backend, device, *tensors)
    assert got[0].dtype == torch.float32
    assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_result_does_not_depend_on_the_number_of_threads(
    on_threads: Callable[..., list[Any]],
) -> None:
    x, bias_D, d_y = normal(700, 300), normal(300, seed=1), normal(700, 300, seed=2)
    first, *others = on_threads(lambda: run("cpp", "cpu", x, bias_D, d_y))
    for result in others:
        assert all(map(torch.equal, first, result))


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpp_cpu, "library_functions", functools.partial(cpp_cpu.library_functions, isa)
    )
    for case in CASES:
        test_sample_inputs_are_right("cpp", "cpu", case)
    test_relative_accuracy_of_every_magnitude("cpp", "cpu")
    for dtype in DTYPES:
        test_large_magnitudes("cpp", "cpu", dtype)


@pytest.mark.skipif(INTERPRETING, reason="the reference")
def test_the_reference_s_gradients_are_its_function_s() -> None:
    x, bias_D = normal(4, 5, scale=3).double().requires_grad_(), normal(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: bias_gelu(x, b, backend="reference"), (x, bias_D))
    far = torch.tensor([-1e200, 1e200, -40.0], dtype=torch.float64)
    d_x, _ = reference.bias_gelu_backward(torch.ones_like(far), far, None)
    assert d_x.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.skipif(INTERPRETING, reason="torch's side is the same for all backends")
@every_backend
@pytest.mark.parametrize("case", CASES)
def test_opcheck(backend: str, device: str, case: int) -> None:
    x, bias_D, _ = to(device, *list(sample_inputs())[case])
    leaf = x.clone().requires_grad_()
    bias_leaf = None if bias_D is None else bias_D.clone().requires_grad_()
    torch.library.opcheck(bias_gelu_op, (leaf, bias_leaf, backend))
    torch.library.opcheck(bias_gelu_backward_op, (torch.ones_like(x), x, bias_D, backend))


@pytest.mark.skipif(INTERPRETING, reason="torch's side is the same for all backends")
@every_backend
@pytest.mark.parametrize("with_bias", [True, False])
def test_compiles_without_a_graph_break(backend: str, device: str, with_bias: bool) -> None:
    def step(x: Tensor, bias_D: Tensor) -> Tensor:
        return 3.0 * bias_gelu(2.0 * x, bias_D if with_bias else None, backend=backend)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, bias_D = (t.requires_grad_() for t in to(device, normal(4, 6, 24), normal(24, seed=1)))
        y = function(x, bias_D)
        y.square().sum().backward()
        results.append((y, x.grad) + ((bias_D.grad,) if with_bias else ()))
    assert all(map(torch.equal, *results))


Change = Callable[[dict[str, Any]], Any]
REFUSALS: list[tuple[str, Change]] = [
    ("x is torch.float64, which the cpp", lambda a: a.update(x=a["x"].double())),
    ("x is torch.int32", lambda a: a.update(x=a["x"].int())),
    ("x has no dimension", lambda a: a.update(x=torch.tensor(1.0))),
    (r"bias_D has the shape \(7,\)", lambda a: a.update(bias_D=a["bias_D"][1:])),
    (
        "bias_D is torch.bfloat16 but x torch.float32",
        lambda a: a.update(bias_D=a["bias_D"].bfloat16()),
    ),
    ("bias_D is on meta", lambda a: a.update(bias_D=a["bias_D"].to("meta"))),
]


@pytest.mark.skipif(INTERPRETING, reason="the same for all backends")
@pytest.mark.parametrize(("message", "change"), REFUSALS)
def test_wrong_arguments_are_refused(message: str, change: Change) -> None:
    arguments: dict[str, Any] = {"x": normal(3, 8), "bias_D": normal(8)}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        bias_gelu(**arguments, backend="cpp")
