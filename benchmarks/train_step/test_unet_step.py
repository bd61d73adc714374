"""A whole training step of the paper's U-Net: ours against diffusers' UNet2DModel; no data loading, no VAE.

Test names are case-provider, for instance `speed-b8-eager`; see `unet.py` for the providers and their gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.conftest import settings_of
from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import Case, Measured, Settings, Unavailable, measure
from benchmarks.train_step.problem import TrainCase, make_problem
from benchmarks.train_step.unet import PROVIDERS, House
from speed_engine.distributed import Processes, start, stop

pytestmark = pytest.mark.timeout(3600)

CASES = (
    TrainCase("speed-b8", "speed", 8, ("cpu",)),
    TrainCase("speed-b32", "speed", 32, ("cuda",)),
    TrainCase("speed-b256", "speed", 256, ("cuda",)),
)
QUICK = (TrainCase("speed-b2-8x8", "speed", 2, ("cpu", "cuda"), sample_size=8),)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = settings_of(metafunc.config)
    cases = QUICK if settings.quick else CASES
    here = [case for case in cases if settings.device.type in case.devices]
    names = [case.name for case in here]
    metafunc.parametrize("measured", here, indirect=True, scope="module", ids=names)
    metafunc.parametrize("provider", PROVIDERS)


@pytest.fixture(scope="module")
def processes(settings: Settings) -> Iterator[Processes]:
    processes = start(settings.device.type)
    yield processes
    stop(together=True)


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, settings: Settings, processes: Processes) -> Measured:
    """The chosen providers of one case, alternating; ours is always among them."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    params = [each.params for each in chosen if each is not None]
    wanted = {each["provider"] for each in params if each.get("measured") == request.param}
    case: TrainCase = request.param
    described = Case(
        op="train_step_unet",
        name=case.name,
        shape="x".join(map(str, (case.batch, *case.shape))),
        dtype="float32",
        num_bytes=0,
        samples=case.batch,
    )
    try:
        house = House(make_problem(case, processes.device), processes)
    except Unavailable as reason:
        pytest.skip(str(reason))
    builders = {
        name: (lambda name=name: house.provider(name))
        for name in PROVIDERS
        if name in wanted or name == "ours"
    }
    result = measure(described, builders, settings, conditions(settings.device))
    torch._dynamo.reset()
    return result


def test_unet_step(
    measured: Measured, provider: str, publish: Callable[[Measured, str], None]
) -> None:
    publish(measured, provider)
