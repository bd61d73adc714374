"""A whole training step of a DiT: draw, noise, forward, loss, backward, optimizer, EMA. No data loading, no VAE.

Providers and their gate: `train_step_providers`, `train_step_ours`, `train_step_gate`; how rounds and memory are
shared: `train_step_measure`, `train_step_memory`. Test names are case-provider, for instance `XL2-b256-compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.conftest import settings_of
from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import Measured, Settings
from benchmarks.train_step.measure import TrainMeasured, measure_case
from benchmarks.train_step.memory import OURS, PLAIN, release
from benchmarks.train_step.problem import CASES, QUICK
from speed_engine.distributed import Processes, start, stop

pytestmark = pytest.mark.timeout(3600)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of the device that was asked for."""
    settings = settings_of(metafunc.config)
    cases = QUICK if settings.quick else CASES
    here = [case for case in cases if settings.device.type in case.devices]
    metafunc.parametrize(
        "measured", here, indirect=True, scope="module", ids=[case.name for case in here]
    )
    metafunc.parametrize("provider", (*PLAIN, *OURS))


@pytest.fixture(scope="module")
def processes(settings: Settings) -> Iterator[Processes]:
    """The one process of this run, as the trainer starts it: DeepSpeed needs a group."""
    processes = start(settings.device.type)
    yield processes
    stop(together=True)


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, settings: Settings, processes: Processes
) -> Iterator[TrainMeasured]:
    # Who was deselected is not even built: of XL/2 on a CPU, one engine at a time fits beside the rivals.
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    params = [each.params for each in chosen if each is not None]
    wanted = {each["provider"] for each in params if each.get("measured") == request.param}
    yield measure_case(request.param, settings, processes, conditions(settings.device), wanted)
    torch._dynamo.reset()
    release(settings.device)


def test_train_step(
    measured: TrainMeasured, provider: str, publish: Callable[[Measured, str], None]
) -> None:
    publish(measured, provider)
