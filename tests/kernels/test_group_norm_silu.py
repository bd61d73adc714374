"""The group_norm_silu op against torch's group norm, SiLU and autograd in float64."""

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
from speed_kernels.group_norm_silu import cpp_cpu
from speed_kernels.group_norm_silu.op import (
    group_norm_silu,
    group_norm_silu_backward_op,
    group_norm_silu_op,
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

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def to(device: str, *values: Any) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


class Problem:
    """Operands of a layer, and what follows from them."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_groups: int,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
        offset: float = 0.5,
        silu: bool = True,
        eps: float = 1e-5,
    ) -> None:
        generator = torch.Generator().manual_seed(9)
        self.x = (torch.randn(shape, generator=generator) + offset).to(dtype)
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.d_y = torch.randn(shape, generator=generator).to(dtype)
        weight, bias = torch.randn(2, shape[1], generator=generator).to(weight_dtype or dtype)
        self.weight, self.bias = 1.0 + 0.3 * weight, 0.5 * bias
        self.num_groups = num_groups
        self.options: dict[str, Any] = {"num_groups": num_groups, "eps": eps, "silu": silu}

    def run(self, backend: str, device: str) -> list[Tensor]:
        """y, d_x, d_weight, d_bias of the op by autograd, on the CPU."""
        tensors = to(device, self.x, self.weight, self.bias)
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = group_norm_silu(*leaves, **self.options, backend=backend)
        gradients = torch.autograd.grad(y, leaves, self.d_y.to(device))
        return [tensor.detach().cpu() for tensor in (y, *gradients)]

    def check(self, got: list[Tensor]) -> None:
        """The op's promise. Sums in torch's float64 are exact beside it."""
        leaves = [t.double().requires_grad_() for t in (self.x, self.weight, self.bias)]
        x_hat = torch.group_norm(leaves[0], self.num_groups, eps=self.options["eps"])
        z = x_hat * leaves[1][:, None, None] + leaves[2][:, None, None]
        y = F.silu(z) if self.options["silu"] else z
        (d_z,) = torch.autograd.grad(y, z, self.d_y.double(), retain_graph=True)
        expected = [y, *torch.autograd.grad(y, leaves, self.d_y.double())]
        x_BGN = self.x.double().reshape(len(self.x), self.num_groups, -1)
        variance_BG = x_BGN.var(2, correction=0) + self.options["eps"]
        # How many times larger than what matters the numbers are that means are taken from.
        distance = 1 + (x_BGN.mean(2).abs() / variance_BG.sqrt()).max()
        weight = leaves[1].abs()[:, None, None]
        assert_within(got[0], y, 2.0**-19 * distance * (1 + z.abs() + weight))
        slope_BG1 = expected[1].reshape(x_BGN.shape).abs().amax(2, keepdim=True)
        flat = (self.d_y.double() * weight).reshape(x_BGN.shape).abs().amax(2, keepdim=True)
        largest = torch.maximum(slope_BG1, flat / variance_BG[..., None].sqrt())
        slack = 2.0**-19 * distance * largest.expand_as(x_BGN).reshape(self.x.shape)
        assert_within(got[1], expected[1], slack)
        d_y = self.d_y.double().abs()
        product = (d_z.abs() + d_y) * (1 + x_hat.abs())
        assert_within(got[2], expected[2], 2.0**-19 * distance * product.sum((0, 2, 3)))
        assert_within(got[3], expected[3], 2.0**-19 * distance * (d_z.abs() + d_y).sum((0, 2, 3)))


def assert_within(got: Tensor, expected: Tensor, slack: Tensor) -> None:
    """`got` within `slack` of `expected` before it was rounded to its dtype."""
    kind = torch.finfo(got.dtype)
    # The interpreter cuts bits off where a GPU rounds.
    unit = kind.eps if INTERPRETING and got.dtype == torch.bfloat16 else kind.eps / 2
    rounding = unit * (expected.abs() + slack) + kind.smallest_normal * kind.eps
    error = (got.double() - expected.detach()).abs()
    assert (error <= slack + rounding).all(), f"{(error / (slack + rounding)).max()} times too far"


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_sample_inputs_are_right(backend: str, device: str, case: int) -> None:
    x, weight, bias, num_groups, eps, silu, _ = list(sample_inputs())[case]
    problem = Problem(tuple(x.shape), num_groups, x.dtype, weight.dtype, eps=eps, silu=silu)
    problem.x, problem.weight, problem.bias = x, weight, bias
    got = problem.run(backend, device)
    for tensor, like in zip(got, (x, x, weight, bias), strict=True):
        assert tensor.dtype == like.dtype and tensor.shape == like.shape
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in got[:2])
    if x.numel() > 0:
        problem.check(got)
    else:
        assert (got[2] == 0).all() and (got[3] == 0).all()


@every_backend
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((1, 8, 4, 4), 8),  # one channel a group
        ((1, 8, 4, 4), 4),  # two
        ((2, 12, 4, 4), 4),  # three
        ((1, 120, 3, 5), 3),  # forty, in blocks that do not divide the channels
        ((1, 160, 4, 4), 16),  # ten, in blocks that do
        ((2, 600, 1, 2), 1),  # one group of several blocks
        ((3, 24, 1, 1), 4),  # a single pixel
        ((2, 5, 1, 1), 5),  # a single element: variance zero
        ((1, 1, 1, 1), 1),
        ((1, 36, 37, 3), 4),  # several runs of rows, the last one short
    ],
)
def test_sizes_of_groups(
    backend: str, device: str, shape: tuple[int, ...], num_groups: int
) -> None:
    problem = Problem(shape, num_groups)
    problem.check(problem.run(backend, device))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_images(backend: str, device: str, dtype: torch.dtype) -> None:
    shape = (1, 12, 33, 33) if INTERPRETING else (2, 40, 64, 64)
    problem = Problem(shape, 4, dtype)
    got = problem.run(backend, device)
    problem.check(got)
    assert all(map(torch.equal, got, problem.run(backend, device)))


@every_backend
def test_partial_results_in_several_blocks(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More runs of rows and channels of a group than are merged at a time."""
    if backend == "triton":
        module = contract.implementation("group_norm_silu", "triton")
        monkeypatch.setattr(module, "PARTS", 8)
        monkeypatch.setattr(module, "SUM_PARTS", 2)
        monkeypatch.setattr(module, "MANY_TILES", 1)
    problem = Problem((2, 20, 19, 19), 2)
    problem.check(problem.run(backend, device))


@every_backend
@pytest.mark.parametrize("offset", [30.0, -1000.0])
def test_means_far_from_zero(backend: str, device: str, offset: float) -> None:
    """A difference of squares would leave nothing of the variance."""
    problem = Problem((2, 12, 13, 11), 3, offset=offset)
    got = problem.run(backend, device)
    problem.check(got)
    variance = problem.x.double().reshape(2, 3, -1).var(2, correction=0)
    tensors = to(device, problem.x, problem.weight, problem.bias)
    _, statistics = group_norm_silu_op(*tensors, 3, 1e-5, True, backend)
    rstd_BG = statistics[:, 1, ::4].cpu().double()
    torch.testing.assert_close(rstd_BG, torch.rsqrt(variance + 1e-5), rtol=2e-6, atol=0)


@every_backend
@pytest.mark.parametrize("value", [0.0, 1234.567, -3e5])
def test_constant_groups(backend: str, device: str, value: float) -> None:
    """Neither variance nor mean may carry rounding that 1 / sqrt(eps) would blow up."""
    problem = Problem((2, 6, 21, 5), 2, silu=False)
    problem.x = torch.full_like(problem.x, value)
    y, d_x, _, _ = problem.run(backend, device)
    assert torch.equal(y, problem.bias[:, None, None].expand_as(y))
    assert d_x.isfinite().all()


@every_backend
def test_large_magnitudes(backend: str, device: str) -> None:
    """No number turns into none where float32 overflows: a variance of infinity leaves the bias."""
    problem = Problem((1, 8, 6, 6), 2)
    problem.x = problem.x * 1e30
    got = problem.run(backend, device)
    assert all(t.isfinite().all() for t in got)
    problem = Problem((1, 8, 6, 6), 2)
    problem.weight = problem.weight * 1e18  # arguments of the SiLU far beyond its bend
    got = problem.run(backend, device)
    assert all(t.isfinite().all() for t in got)
    expected = F.silu(F.group_norm(problem.x, 2, problem.weight, problem.bias))
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e12)


@every_backend
def test_not_a_number_stays_in_its_group(backend: str, device: str) -> None:
    problem = Problem((2, 8, 5, 5), 4)
    problem.x[1, 3, 2, 2] = math.nan
    y, d_x, d_weight, d_bias = problem.run(backend, device)
    spoilt = torch.zeros(2, 8, dtype=torch.bool)
    spoilt[1, 2:4] = True
    for tensor in (y, d_x):
        assert torch.equal(tensor.isnan().flatten(2).all(2), spoilt)
        assert torch.equal(tensor.isnan().flatten(2).any(2), spoilt)
    for tensor in (d_weight, d_bias):
        assert torch.equal(tensor.isnan(), spoilt[1])


@every_backend
def test_a_sample_s_result_does_not_depend_on_its_batch(backend: str, device: str) -> None:
    problem = Problem((3, 24, 9, 7), 4)
    whole = problem.run(backend, device)
    for b in range(3):
        alone = Problem((1, 24, 9, 7), 4)
        alone.x, alone.d_y = problem.x[b : b + 1], problem.d_y[b : b + 1]
        alone.weight, alone.bias = problem.weight, problem.bias
        got = alone.run(backend, device)
        assert all(torch.equal(got[i][0], whole[i][b]) for i in (0, 1))


@every_backend
def test_any_strides(backend: str, device: str) -> None:
    problem = Problem((2, 12, 6, 5), 3)
    expected = problem.run(backend, device)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.contiguous(),
        lambda t: torch.cat((t, t), 1)[:, :12],
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ]
    for layout in layouts:
        moved = Problem((2, 12, 6, 5), 3)
        moved.x, moved.d_y = layout(problem.x), layout(problem.d_y)
        moved.weight = torch.stack((problem.weight, problem.weight), 1)[:, 0]
        assert not moved.x.is_contiguous(memory_format=torch.channels_last)
        assert all(map(torch.equal, moved.run(backend, device), expected))


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_result_does_not_depend_on_the_number_of_threads(
    on_threads: Callable[..., list[Any]],
) -> None:
    problem = Problem((3, 320, 24, 24), 32)
    first, *others = on_threads(lambda: problem.run("cpp", "cpu"))
    for result in others:
        assert all(map(torch.equal, first, result))
    problem.check(first)


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpp_cpu, "library_functions", functools.partial(cpp_cpu.library_functions, isa)
    )
    for case in CASES:
        test_sample_inputs_are_right("cpp", "cpu", case)
    test_means_far_from_zero("cpp", "cpu", -1000.0)
    test_constant_groups("cpp", "cpu", 1234.567)


@pytest.mark.skipif(INTERPRETING, reason="the reference")
@pytest.mark.parametrize("silu", [True, False])
def test_the_reference_s_gradients_are_its_function_s(silu: bool) -> None:
    problem = Problem((2, 4, 2, 3), 2, torch.float64)
    leaves = tuple(t.requires_grad_() for t in (problem.x, problem.weight, problem.bias))
    assert torch.autograd.gradcheck(
        lambda x, w, b: group_norm_silu(x, w, b, num_groups=2, silu=silu, backend="reference"),
        leaves,
    )


@pytest.mark.skipif(INTERPRETING, reason="torch's side is the same for all backends")
@every_backend
@pytest.mark.parametrize("case", CASES)
def test_opcheck(backend: str, device: str, case: int) -> None:
    *tensors, num_groups, eps, silu, _ = to(device, *list(sample_inputs())[case])
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(group_norm_silu_op, (*leaves, num_groups, eps, silu, backend))
    _, statistics = group_norm_silu_op(*tensors, num_groups, eps, silu, backend)
    args = (torch.ones_like(tensors[0]), *tensors, statistics, num_groups, silu, backend)
    torch.library.opcheck(group_norm_silu_backward_op, args)


@pytest.mark.skipif(INTERPRETING, reason="torch's side is the same for all backends")
@every_backend
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(backend: str, device: str, autocast: bool) -> None:
    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            return 3.0 * group_norm_silu(2.0 * x, weight, bias, num_groups=3, backend=backend)

    problem = Problem((2, 12, 6, 5), 3)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = to(device, problem.x, problem.weight, problem.bias)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, problem.d_y.to(device))))
        assert y.dtype == torch.float32
    assert all(map(torch.equal, *results))


Change = Callable[[dict[str, Any]], Any]
REFUSALS: list[tuple[str, Change]] = [
    ("x_BCHW is torch.float64", lambda a: a.update(x_BCHW=a["x_BCHW"].double())),
    (r"x_BCHW has the shape \(12, 6, 5\)", lambda a: a.update(x_BCHW=a["x_BCHW"][0])),
    (r"weight_C has the shape \(11,\)", lambda a: a.update(weight_C=a["weight_C"][1:])),
    ("bias_C is torch.float16", lambda a: a.update(bias_C=a["bias_C"].half())),
    ("bias_C is on meta", lambda a: a.update(bias_C=a["bias_C"].to("meta"))),
    ("num_groups=5 does not divide", lambda a: a.update(num_groups=5)),
    ("num_groups=0 does not divide", lambda a: a.update(num_groups=0)),
    ("eps=0.0 is not positive", lambda a: a.update(eps=0.0)),
]


@pytest.mark.skipif(INTERPRETING, reason="the same for all backends")
@pytest.mark.parametrize(("message", "change"), REFUSALS)
def test_wrong_arguments_are_refused(message: str, change: Change) -> None:
    problem = Problem((2, 12, 6, 5), 3)
    arguments: dict[str, Any] = {
        "x_BCHW": problem.x, "weight_C": problem.weight, "bias_C": problem.bias, "num_groups": 3
    }  # fmt: skip
    change(arguments)
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments, backend="cpp")
