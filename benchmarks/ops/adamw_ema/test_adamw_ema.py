"""One optimizer step over a whole model: AdamW and an EMA of the weights, as separate tensors and as one flat buffer.

`plain` cases have float32 gradients; `mixed` ones bfloat16 gradients, clipping and bfloat16 weights (adamw_providers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal

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
from benchmarks.ops.adamw_ema import gate as adamw_gate
from benchmarks.ops.adamw_ema import providers as rivals
from benchmarks.ops.adamw_ema.providers import Problem, Stepper

pytestmark = pytest.mark.timeout(1800)

PROVIDERS = ("reference", "eager", "compile", "apex", "deepspeed", "ours")


Form = Literal["list", "flat"]


@dataclass(frozen=True)
class Size:
    """A DiT of that depth and width, on the device type where it is measured."""

    name: str
    depth: int
    width: int
    form: Form
    device: str
    mixed: bool = False


SIZES = (
    Size("25m-list", 9, 384, "list", "cpu"),
    Size("25m-flat", 9, 384, "flat", "cpu"),
    Size("100m-list", 9, 768, "list", "cpu"),
    Size("100m-flat", 9, 768, "flat", "cpu"),
    Size("100m-flat-mixed", 9, 768, "flat", "cpu", mixed=True),
    Size("675m-list", 28, 1152, "list", "cuda"),
    Size("675m-list-mixed", 28, 1152, "list", "cuda", mixed=True),
    Size("675m-flat", 28, 1152, "flat", "cuda"),
    Size("675m-flat-mixed", 28, 1152, "flat", "cuda", mixed=True),
)
QUICK_FORMS: tuple[tuple[Form, bool], ...] = (("list", False), ("flat", False), ("flat", True))
QUICK = tuple(
    Size(f"2m-{form}{'-mixed' if mixed else ''}", 1, 256, form, device, mixed)
    for device in ("cpu", "cuda")
    for form, mixed in QUICK_FORMS
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The sizes of the device that was asked for; test names are size-provider."""
    settings = settings_of(metafunc.config)
    sizes = QUICK if settings.quick else SIZES
    here = [size for size in sizes if settings.device.type == size.device]
    metafunc.parametrize(
        "measured", here, indirect=True, scope="module", ids=[size.name for size in here]
    )
    metafunc.parametrize("provider", PROVIDERS)


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Measured]:
    yield measure_size(request.param, settings)
    torch._dynamo.reset()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()


def test_adamw_ema(
    measured: Measured, provider: str, publish: Callable[[Measured, str], None]
) -> None:
    publish(measured, provider)


def measure_size(size: Size, settings: Settings) -> Measured:
    """All providers of one size."""
    torch._dynamo.reset()
    shapes = rivals.dit_shapes(size.depth, size.width)
    problem = rivals.make_problem(shapes, settings.device, size.form, size.mixed)
    num_params = sum(param.numel() for param in problem.params)
    case = Case(
        op="adamw_ema",
        name=size.name,
        shape=f"{num_params} in {len(problem.params)} tensors",
        dtype="bfloat16 gradients" if size.mixed else "float32",
        num_bytes=rivals.num_bytes(num_params, size.mixed),
    )

    def provider(build: Callable[[Problem], Stepper], never_waits: bool = False) -> Provider:
        stepper = build(problem)
        return Provider(
            gate=lambda: adamw_gate.check(build, settings.device, size.form, size.mixed),
            call=stepper.step,
            device_part=stepper.step if never_waits else None,
            after_capture=stepper.after_capture,
            facts=stepper.facts,
            never_waits=never_waits,
        )

    builders: dict[str, Callable[[], Provider]] = {
        "reference": lambda: provider(rivals.reference),
        "eager": lambda: provider(rivals.eager),
        "compile": lambda: provider(_fastest(problem, size.form, settings)),
        "apex": lambda: provider(rivals.apex),
        "deepspeed": lambda: provider(rivals.deepspeed),
        "ours": lambda: provider(rivals.ours, never_waits=True),
    }
    return measure(case, builders, settings, conditions(settings.device))


def _fastest(problem: Problem, form: Form, settings: Settings) -> Callable[[Problem], Stepper]:
    """torch.compile in the mode that a short trial finds fastest."""
    modes = rivals.COMPILE_MODES[form]
    steppers: dict[str, Stepper] = {}
    failed: dict[str, str] = {}
    for mode in modes[:1] if settings.quick else modes:
        stepper = rivals.compiled(problem, mode)
        try:
            stepper.step()
        except Exception as error:  # whatever a compiler throws: the report says so
            failed[mode] = str(error).splitlines()[0][:200]
            continue
        steppers[mode] = stepper
    if not steppers:
        raise Unavailable(f"torch.compile failed in every mode: {failed}")
    steps = {mode: stepper.step for mode, stepper in steppers.items()}
    trial = alternate(steps, Stopwatch(problem.device), 2.0, min_rounds=2, max_rounds=10)
    best = min(trial, key=lambda mode: median(trial[mode]))
    ready = steppers[best]
    if failed:
        ready.facts["compile_failed"] = failed
    return lambda other: ready if other is problem else rivals.compiled(other, best)
