"""Single ops of a DiT block, forward and backward: gate + residual + norm + modulate, bias + GELU, attention.

`reference` computes in float32; everybody else in the dtype of the case. Backward is torch.autograd.grad on a graph
that is kept. Providers: `adaln_providers`. Test names are op-case-provider, for instance
`bias_gelu-XL2-b256-bf16-backward-ours`; mixed is a residual stream in fp32 between products in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import pytest
import torch
import torch._functorch.config as functorch
from torch import Tensor

from benchmarks.conftest import settings_of
from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import (
    Case,
    GateError,
    Measured,
    Provider,
    Settings,
    Stopwatch,
    Unavailable,
    alternate,
    measure,
)
from benchmarks.ops.adaln import providers as rivals
from benchmarks.ops.adaln.providers import Function, Problem

pytestmark = pytest.mark.timeout(1800)

COMPILE_MODES = {"cpu": ("default",), "cuda": ("default", "max-autotune-no-cudagraphs")}
# Of the error's norm over the norm: the dtype's rounding, a few times in a row.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
GATE_SAMPLES = 8  # of the batch: sums over tokens are within a sample


@dataclass(frozen=True)
class OpCase:
    """An op at a network's sizes in one direction. dtypes: of the residual stream and of everything else."""

    op: str
    network: str
    batch: int
    width: int
    heads: int
    stream: torch.dtype
    compute: torch.dtype
    direction: Literal["forward", "backward"]
    tokens: int = 256

    @property
    def name(self) -> str:
        words = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        dtypes = words[self.stream] if self.stream == self.compute else "mixed"
        return f"{self.network}-b{self.batch}-{dtypes}-{self.direction}"

    def problem(self, device: torch.device, batch: int | None = None) -> Problem:
        """The inputs, of fewer samples where the gate asks for it."""
        batch = batch or self.batch
        if self.op == "bias_gelu":
            return rivals.gelu_problem(batch * self.tokens, 4 * self.width, self.compute, device)
        if self.op == "attention":
            head = self.width // self.heads
            return rivals.attention_problem(
                batch, self.tokens, self.heads, head, self.compute, device
            )
        sizes = (batch, self.tokens, self.width)
        return rivals.glue_problem(*sizes, self.stream, self.compute, device)


def cases_of(settings: Settings) -> list[OpCase]:
    """The cases of the device that was asked for."""
    bf16, fp32 = torch.bfloat16, torch.float32
    glue, gelu, attention = rivals.PROVIDERS
    rows: list[tuple[str, str, int, int, int, torch.dtype, torch.dtype]]
    if settings.quick:
        rows = [(op, "tiny", 2, 64, 4, fp32, fp32) for op in rivals.PROVIDERS]
    elif settings.device.type == "cpu":
        rows = [
            (glue, "S2", 16, 384, 6, fp32, bf16),
            (glue, "S2", 16, 384, 6, fp32, fp32),
            (gelu, "S2", 16, 384, 6, bf16, bf16),
            (attention, "XL2", 4, 1152, 16, bf16, bf16),
        ]
    else:
        rows = [
            (glue, "XL2", 256, 1152, 16, bf16, bf16),
            (glue, "XL2", 256, 1152, 16, fp32, bf16),
            (glue, "XL2", 32, 1152, 16, bf16, bf16),
            (gelu, "XL2", 256, 1152, 16, bf16, bf16),
            (attention, "XL2", 256, 1152, 16, bf16, bf16),
            (attention, "XL2", 32, 1152, 16, bf16, bf16),
        ]
    tokens = 16 if settings.quick else 256
    directions: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    return [OpCase(*row, direction, tokens) for row in rows for direction in directions]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case with the providers of its op."""
    pairs = [
        (case, provider)
        for case in cases_of(settings_of(metafunc.config))
        for provider in rivals.PROVIDERS[case.op]
    ]
    names = [f"{case.op}-{case.name}-{provider}" for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=names)


@pytest.fixture(scope="module")
def measured(settings: Settings) -> Callable[[OpCase], Measured]:
    """What a case's providers took; a case is measured when its first provider is asked for."""
    known: dict[OpCase, Measured] = {}

    def measured(case: OpCase) -> Measured:
        if case not in known:
            known[case] = measure_op(case, settings)
            torch._dynamo.reset()
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()
        return known[case]

    return measured


def test_adaln(
    case: OpCase,
    provider: str,
    measured: Callable[[OpCase], Measured],
    publish: Callable[[Measured, str], None],
) -> None:
    publish(measured(case), provider)


def measure_op(case: OpCase, settings: Settings) -> Measured:
    """All providers of one op, shape and direction."""
    torch._dynamo.reset()
    problem = case.problem(settings.device)
    count = rivals.forward_bytes if case.direction == "forward" else rivals.backward_bytes
    described = Case(
        op=case.op,
        name=case.name,
        shape="x".join(map(str, problem.inputs[0].shape)),
        dtype=str(case.compute).removeprefix("torch."),
        num_bytes=count(problem),
    )
    builders: dict[str, Callable[[], Provider]] = {
        name: (lambda name=name: _provider(name, case, problem, settings))
        for name in rivals.PROVIDERS[case.op]
    }
    return measure(described, builders, settings, conditions(settings.device))


def _provider(name: str, case: OpCase, problem: Problem, settings: Settings) -> Provider:
    small = case.problem(settings.device, min(case.batch, GATE_SAMPLES))
    if name == "reference":
        problem, small = problem.cast(torch.float32), small.cast(torch.float32)
        function = rivals.function_of(problem, name)
        facts: dict[str, Any] = {"dtype": "float32"}
        return _as_provider(function, case, problem, small, facts, by_hand=True)
    if name == "compile":
        return _compiled(case, problem, small, settings)
    function = rivals.function_of(problem, name)
    ours = name == "ours"
    return _as_provider(function, case, problem, small, {}, by_hand=not ours, never_waits=ours)


def _as_provider(
    function: Function,
    case: OpCase,
    problem: Problem,
    small: Problem,
    facts: dict[str, Any],
    by_hand: bool,
    never_waits: bool = False,
) -> Provider:
    """`by_hand`: a bias and the sum of its gradient are not part of the function (see adaln_providers)."""
    by_hand = by_hand and problem.summed is not None
    call = direction(function, problem, case.direction, by_hand)
    part, base = on_device(function, problem, case.direction, by_hand)
    gate = lambda: check(function, small, by_hand)  # noqa: E731
    return Provider(gate, call, part, facts, never_waits, base)


def on_device(
    function: Function, problem: Problem, which: str, by_hand: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """What a CUDA graph replays, and what of it is not timed: autograd runs a backward pass on the stream of its
    forward pass, so that both must be captured."""
    if which == "forward":
        return lambda: function(*problem.inputs), lambda: None
    both = lambda: gradients(function(*problem.inputs), problem, by_hand)  # noqa: E731
    return both, lambda: function(*problem.inputs)


def direction(
    function: Function, problem: Problem, which: str, by_hand: bool
) -> Callable[[], object]:
    """The call that is timed."""
    if which == "forward":
        return lambda: function(*problem.inputs)
    outputs = function(*problem.inputs)
    return lambda: gradients(outputs, problem, by_hand)


def gradients(outputs: tuple[Tensor, ...], problem: Problem, by_hand: bool) -> tuple[Tensor, ...]:
    """Of all inputs; the graph is kept for the next call."""
    if not by_hand or problem.summed is None:
        return torch.autograd.grad(outputs, problem.inputs, problem.grads, retain_graph=True)
    large = problem.inputs[problem.summed]
    (grad,) = torch.autograd.grad(outputs, (large,), problem.grads, retain_graph=True)
    return grad, grad.sum(0)


def check(function: Function, problem: Problem, by_hand: bool) -> None:
    """Outputs and gradients against the definition in float64. Raises GateError."""
    inputs = problem.inputs
    if by_hand:  # what the product before would have made of the bias
        large = (inputs[0] + inputs[1]).detach().requires_grad_()
        inputs = (large, inputs[1])
    given = Problem(problem.op, inputs, problem.grads, problem.truth, problem.summed)
    outputs = function(*given.inputs)
    found = [*outputs, *gradients(outputs, given, by_hand)]
    exact = problem.cast(torch.float64)
    expected = list(exact.truth(*exact.inputs))
    expected += torch.autograd.grad(tuple(expected), exact.inputs, exact.grads)
    tolerance = max(TOLERANCE[each.dtype] for each in problem.inputs)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.shape != other.shape:
            raise GateError(f"result {index} has the shape {tuple(one.shape)}")
        error = float((one.double() - other).norm() / other.norm())
        if not error <= tolerance:
            raise GateError(f"result {index} is off by {error:.2e} of its norm")


def _compiled(case: OpCase, problem: Problem, small: Problem, settings: Settings) -> Provider:
    """The fastest mode of torch.compile, by a short trial. The graph is kept, so no buffer may be donated."""
    modes = COMPILE_MODES[settings.device.type]
    built: dict[str, tuple[Function, Callable[[], object]]] = {}
    failed: dict[str, str] = {}
    for mode in modes[:1] if settings.quick else modes:
        function = torch.compile(problem.truth, mode=mode, dynamic=False, fullgraph=True)
        try:
            with functorch.patch(donated_buffer=False):
                call = direction(function, problem, case.direction, by_hand=False)
                call()
                check(function, small, by_hand=False)
        except GateError:
            raise
        except Exception as error:  # whatever a compiler throws: the report says so
            failed[mode] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        built[mode] = function, call
    if not built:
        raise Unavailable(f"torch.compile failed in every mode: {failed}")
    calls = {mode: call for mode, (_, call) in built.items()}
    trial = alternate(calls, Stopwatch(problem.device), 1.0, 2, 10)
    best = min(trial, key=lambda mode: median(trial[mode]))
    facts: dict[str, Any] = {"compile_mode": best} | ({"compile_failed": failed} if failed else {})
    part, base = on_device(built[best][0], problem, case.direction, by_hand=False)
    return Provider(
        lambda: None, calls[best], part, facts, device_base=base
    )  # the gate was green above
