"""Group norm with SiLU at the shapes of the paper's U-Net, forward and backward.

`reference` computes in float32 in plain NCHW memory; everybody else in the dtype of the case, in channels-last memory.
Backward is torch.autograd.grad on a graph that is kept. Test names are case-provider, for instance
`b16-128x32-fp32-backward-ours`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch._functorch.config as functorch
from torch._dynamo.exc import TorchDynamoException

from benchmarks.conftest import settings_of
from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import (
    Case,
    GateError,
    Measured,
    Provider,
    Settings,
    Unavailable,
    measure,
)
from benchmarks.ops.group_norm_silu import providers as rivals
from benchmarks.ops.group_norm_silu.providers import Function, Problem

pytestmark = pytest.mark.timeout(1800)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the error's norm over the norm
WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class NormCase:
    """A shape [B, C, S, S] in one direction."""

    batch: int
    channels: int
    side: int
    dtype: torch.dtype
    direction: Literal["forward", "backward"]

    @property
    def name(self) -> str:
        size = f"b{self.batch}-{self.channels}x{self.side}"
        return f"{size}-{WORDS[self.dtype]}-{self.direction}"

    def problem(self, device: torch.device) -> Problem:
        shape = (self.batch, self.channels, self.side, self.side)
        return rivals.make_problem(shape, self.dtype, device)


def cases_of(settings: Settings) -> list[NormCase]:
    """The first and the second level, and a join on the way up; on a GPU also 256 samples."""
    sizes = ((128, 32), (256, 16), (512, 16))
    dtypes = tuple(WORDS) if settings.device.type == "cpu" else (torch.bfloat16,)
    batches = (16,) if settings.device.type == "cpu" else (32, 256)
    if settings.quick:
        sizes, dtypes, batches = ((64, 4),), (torch.float32,), (2,)
    directions: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    return [
        NormCase(batch, channels, side, dtype, direction)
        for batch in batches
        for channels, side in sizes
        for dtype in dtypes
        for direction in directions
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case with all providers."""
    cases = cases_of(settings_of(metafunc.config))
    pairs = [(case, provider) for case in cases for provider in rivals.PROVIDERS]
    names = [f"{case.name}-{provider}" for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=names)


@pytest.fixture(scope="module")
def measured(settings: Settings) -> Callable[[NormCase], Measured]:
    """What a case's providers took; a case is measured when its first provider is asked for."""
    known: dict[NormCase, Measured] = {}

    def measured(case: NormCase) -> Measured:
        if case not in known:
            known[case] = measure_norm(case, settings)
            torch._dynamo.reset()
        return known[case]

    return measured


def test_group_norm_silu(
    case: NormCase,
    provider: str,
    measured: Callable[[NormCase], Measured],
    publish: Callable[[Measured, str], None],
) -> None:
    publish(measured(case), provider)


def measure_norm(case: NormCase, settings: Settings) -> Measured:
    """All providers of one shape and direction."""
    problem = case.problem(settings.device)
    image = problem.grad.nbytes
    described = Case(
        op="group_norm_silu",
        name=case.name,
        shape="x".join(map(str, problem.grad.shape)),
        dtype=str(case.dtype).removeprefix("torch."),
        num_bytes=image * (2 if case.direction == "forward" else 3),
    )
    builders: dict[str, Callable[[], Provider]] = {
        name: (lambda name=name: _provider(name, case, problem)) for name in rivals.PROVIDERS
    }
    # The compiled backward pass reads its graph again in every round, so that no buffer may be donated.
    with functorch.patch(donated_buffer=False):
        return measure(described, builders, settings, conditions(settings.device))


def _provider(name: str, case: NormCase, problem: Problem) -> Provider:
    facts: dict[str, Any] = {}
    if name == "reference":
        problem = problem.cast(torch.float32, torch.contiguous_format)
        facts["dtype"] = "float32"
    if name == "ours":
        function = rivals.ours(problem)
    elif name == "apex":
        function = rivals.apex(problem)
    elif name == "compile":
        function = torch.compile(rivals.plain, dynamic=False, fullgraph=True)
    else:
        function = rivals.plain
    try:
        call = direction(function, problem, case.direction)
        call()  # a compiler makes its backward pass here
        check(function, problem)
    except TorchDynamoException as error:
        raise Unavailable(f"torch.compile failed: {str(error).splitlines()[0][:200]}") from error
    # Autograd runs a backward pass on the stream of its forward pass, which is not the one that captures.
    device_part = call if case.direction == "forward" else None
    return Provider(lambda: None, call, device_part, facts, never_waits=name == "ours")


def direction(function: Function, problem: Problem, which: str) -> Callable[[], object]:
    """The call that is timed."""
    if which == "forward":
        return lambda: function(*problem.inputs)
    y = function(*problem.inputs)
    return lambda: torch.autograd.grad(y, problem.inputs, problem.grad, retain_graph=True)


def check(function: Function, problem: Problem) -> None:
    """Output and gradients against torch's in float64. Raises GateError."""
    found, expected = [], []
    exact = problem.cast(torch.float64, torch.contiguous_format)
    for results, call, given in ((found, function, problem), (expected, rivals.plain, exact)):
        y = call(*given.inputs)
        results += [y, *torch.autograd.grad(y, given.inputs, given.grad)]
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = float((one.double() - other).norm() / other.norm())
        if not error <= TOLERANCE[problem.grad.dtype]:
            raise GateError(f"result {index} is off by {error:.2e} of its norm")
