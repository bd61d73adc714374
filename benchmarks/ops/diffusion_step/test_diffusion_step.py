"""The diffusion step (draw t, noise, mix, losses, gradient by the network's output), learned variance, T = 1000.

x0 is float32 as loaders give it; the network's output and x_t have the dtype of `--dtype`. The step is timed from an
idle device to an idle device, all providers alternating; see `diffusion_providers` and `harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.conftest import settings_of
from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import (
    Case,
    Measured,
    Provider,
    Settings,
    Stopwatch,
    Unavailable,
    alternate,
    measure,
)
from benchmarks.ops.diffusion_step import gate as diffusion_gate
from benchmarks.ops.diffusion_step import providers as rivals
from benchmarks.ops.diffusion_step.providers import Problem, Step

pytestmark = pytest.mark.timeout(1800)

PROVIDERS = ("reference", "eager", "compile", "ours")
GATE_SHAPE = (24, 3, 9, 7)  # besides the timed shape: odd sizes
GATE_ELEMENTS = 2**20


@dataclass(frozen=True)
class Shape:
    """[B, C, H, W] under a name, on the device types where it is measured."""

    name: str
    sizes: tuple[int, int, int, int]
    devices: tuple[str, ...] = ("cpu", "cuda")


SHAPES = (
    Shape("latents32-b32", (32, 4, 32, 32)),
    Shape("latents32-b256", (256, 4, 32, 32)),
    Shape("latents64-b256", (256, 4, 64, 64)),
    Shape("pixels256-b64", (64, 3, 256, 256), ("cpu",)),
    Shape("pixels256-b256", (256, 3, 256, 256), ("cuda",)),
)
QUICK = (Shape("latents32-b32", (32, 4, 32, 32)),)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The shapes of the device that was asked for; test names are shape-provider."""
    settings = settings_of(metafunc.config)
    shapes = QUICK if settings.quick else SHAPES
    here = [shape for shape in shapes if settings.device.type in shape.devices]
    metafunc.parametrize(
        "measured", here, indirect=True, scope="module", ids=[shape.name for shape in here]
    )
    metafunc.parametrize("provider", PROVIDERS)


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Measured]:
    yield measure_shape(request.param, settings)
    torch._dynamo.reset()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()


def test_diffusion_step(
    measured: Measured, provider: str, publish: Callable[[Measured, str], None]
) -> None:
    publish(measured, provider)


def measure_shape(shape: Shape, settings: Settings) -> Measured:
    """All providers of one shape."""
    torch._dynamo.reset()  # every shape starts without compiled code of another
    device, dtype = settings.device, settings.dtype
    problem = rivals.make_problem(shape.sizes, device, dtype)
    case = Case(
        op="diffusion_step",
        name=shape.name,
        shape="x".join(map(str, shape.sizes)),
        dtype=str(dtype).removeprefix("torch."),
        num_bytes=rivals.num_bytes(shape.sizes, dtype),
    )
    builders: dict[str, Callable[[], Provider]] = {
        "reference": lambda: _reference(problem),
        "eager": lambda: _eager(problem),
        "compile": lambda: _compile(problem, settings),
        "ours": lambda: _ours(problem),
    }
    return measure(case, builders, settings, conditions(device))


def _gate(problem: Problem, build: Callable[[Problem], Step], step: Step) -> Callable[[], None]:
    """The timed step itself, then the same code in float32 on skewed draws, with few such samples and odd ones."""

    def gate() -> None:
        diffusion_gate.check(problem, step)
        batch, *rest = problem.x0.shape
        few = max(4, min(batch, GATE_ELEMENTS // problem.x0[0].numel()))
        for sizes in ((few, *rest), GATE_SHAPE):
            skewed = rivals.make_problem(sizes, problem.device, torch.float32, skewed=True, seed=1)
            diffusion_gate.check(skewed, build(skewed))

    return gate


def _reference(problem: Problem) -> Provider:
    step = rivals.reference(problem)
    return Provider(_gate(problem, rivals.reference, step), step)


def _eager(problem: Problem) -> Provider:
    step, device_part = rivals.eager(problem)
    gate = _gate(problem, lambda other: rivals.eager(other)[0], step)
    return Provider(gate, step, device_part)


def _ours(problem: Problem) -> Provider:
    step, device_part, facts = rivals.ours(problem)
    gate = _gate(problem, lambda other: rivals.ours(other)[0], step)
    return Provider(gate, step, device_part, dict(facts), never_waits=True)


def _compile(problem: Problem, settings: Settings) -> Provider:
    """The fastest variant of torch.compile, by a short trial of all."""
    variants = rivals.COMPILE_VARIANTS[problem.device.type]
    steps: dict[str, Step] = {}
    device_parts: dict[str, Step | None] = {}
    facts: dict[str, Any] = {}
    for mode, inside in variants[:1] if settings.quick else variants:
        name = f"{mode}, noise {'inside' if inside else 'outside'}"
        step, device_part = rivals.compiled(problem, mode, inside)
        try:
            step()
        except (
            Exception
        ) as error:  # whatever a compiler throws: the report says so, the others go on
            facts.setdefault("compile_failed", {})[name] = str(error).splitlines()[0][:200]
            continue
        steps[name], device_parts[name] = step, device_part
    if not steps:
        raise Unavailable(f"torch.compile failed in every variant: {facts['compile_failed']}")
    trial = alternate(steps, Stopwatch(problem.device), seconds=2.0, min_rounds=2, max_rounds=15)
    name = facts["compile_mode"] = min(trial, key=lambda each: median(trial[each]))
    mode, inside = name.split(",")[0], name.endswith("inside")
    gate = _gate(problem, lambda other: rivals.compiled(other, mode, inside)[0], steps[name])
    return Provider(gate, steps[name], device_parts[name], facts)
