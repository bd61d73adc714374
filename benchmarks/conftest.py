"""Options of the benchmarks, and how a measured case becomes rows of pytest-benchmark (see harness.ReplayClock)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness.measure import Measured, ReplayClock, Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("speed-engine benchmarks")
    group.addoption("--quick", action="store_true", help="does it run? The numbers mean nothing")
    group.addoption(
        "--seconds", type=float, default=15.0, help="for the rounds of one case (default 15)"
    )
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.addoption(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the network's output in diffusion_step; auto: bfloat16 on CUDA, else float32",
    )


def settings_of(config: pytest.Config) -> Settings:
    """The options as one value."""
    device: Any = config.getoption("--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = config.getoption("--dtype")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    quick = bool(config.getoption("--quick"))
    seconds: Any = config.getoption("--seconds")
    return Settings(
        device=torch.device(device),
        dtype=DTYPES[dtype],
        quick=quick,
        seconds=0.0 if quick else seconds,
        min_rounds=2 if quick else 7,
        max_rounds=2 if quick else 101,
    )


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return settings_of(request.config)


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> ReplayClock:
    """Must be made before `benchmark`, which takes its timer from the marker."""
    clock = ReplayClock()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    return clock


@pytest.fixture
def publish(clock: ReplayClock, benchmark: Any) -> Callable[[Measured, str], None]:
    """Report one provider of a measured case as this test's benchmark; fail where its gate is red."""

    def publish(measured: Measured, provider: str) -> None:
        if provider in measured.red:
            pytest.fail(f"correctness gate of {provider}: {measured.red[provider]}", pytrace=False)
        if provider in measured.missing:
            pytest.skip(f"{provider}: {measured.missing[provider]}")
        times = measured.times[provider]
        benchmark.group = f"{measured.case.op} {measured.case.name}"
        benchmark.extra_info.update(measured.row(provider))
        benchmark.pedantic(clock.replay(times), rounds=len(times), iterations=1, warmup_rounds=0)

    return publish
