"""Times rival providers of one case fairly: alternating round by round in one process, compared as paired ratios.

A provider is a function of no arguments that does the whole work of the case once. In every round each provider runs
once, in an order that rotates and turns around, together with a large copy that tells how fast memory was at that
moment; a disturbed round therefore disturbs all of them. A ratio is the median over the rounds of baseline / ours.
A provider whose correctness gate is red is never timed. Nothing here asserts anything about speed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.harness import counts
from benchmarks.harness.limit import at_most, rival_seconds
from benchmarks.harness.refusals import GateError, Unavailable

OURS = "ours"
COPY = "copy"  # the hidden provider: a large copy, for the memory bandwidth of the same rounds
COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**30}  # float32; far larger than any cache


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: torch.device
    dtype: torch.dtype  # of the network's output
    quick: bool  # only show that everything runs; the numbers mean nothing
    seconds: float  # time for the rounds of one case
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Case:
    """One problem that all providers of an op solve."""

    op: str
    name: str
    shape: str
    dtype: str
    num_bytes: int  # least traffic: every input read once, every output written once
    samples: int = 0  # per call, where samples per second mean something


@dataclass(frozen=True)
class Ratio:
    """How many times slower a baseline is, over paired rounds. Above 1: ours is faster."""

    median: float
    q1: float
    q3: float
    rounds: int


@dataclass
class Measured:
    """Seconds of every provider in every round, and what there is to say about them."""

    case: Case
    device: torch.device
    conditions: Mapping[str, Any]
    times: dict[str, list[float]]
    red: dict[str, str] = field(default_factory=dict)  # provider -> what its gate found
    missing: dict[str, str] = field(default_factory=dict)  # provider -> why it cannot run here
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # provider -> further columns
    quick: bool = False

    @property
    def copy_bytes_per_second(self) -> float:
        """Read and written bytes per second of the large copy, median of the rounds."""
        return 2 * 4 * copy_elements(self.device) / statistics.median(self.times[COPY])

    def row(self, provider: str) -> dict[str, Any]:
        """The columns of one provider, for pytest-benchmark's `extra_info` and the report."""
        times = self.times[provider]
        bandwidth = self.copy_bytes_per_second
        floor = self.case.num_bytes / bandwidth
        row = self.common(provider, times, bandwidth, floor)
        if self.case.samples:
            row["samples_per_s"] = self.case.samples / statistics.median(times)
        if "gpu_time_s" in row:
            row["floor_fraction_gpu"] = floor / row["gpu_time_s"]
        if provider == OURS:
            for baseline in self.times:
                if baseline not in (OURS, COPY):
                    ratio = paired_ratio(self.times[baseline], times)
                    key = f"ratio_vs_{baseline.replace('-', '_')}"
                    row |= {key: ratio.median, f"{key}_q1": ratio.q1, f"{key}_q3": ratio.q3}
                    rivals_gpu = self.facts.get(baseline, {}).get("gpu_time_s")
                    if rivals_gpu is not None and row.get("gpu_time_s"):
                        row[f"gpu_{key}"] = rivals_gpu / row["gpu_time_s"]
        return row

    def common(
        self, provider: str, times: Sequence[float], bandwidth: float, floor: float
    ) -> dict[str, Any]:
        """The columns of any benchmark. `bandwidth` of the copy in bytes per second, `floor` in seconds."""
        row: dict[str, Any] = {
            "op": self.case.op,
            "case": self.case.name,
            "provider": provider,
            "device": self.device.type,
            "dtype": self.case.dtype,
            "shape": self.case.shape,
            "bytes": self.case.num_bytes,
            "copy_gb_per_s": bandwidth / 1e9,
            "floor_fraction": floor / statistics.median(times),
            "rounds": len(times),
            **self.conditions,
            **self.facts.get(provider, {}),
        }
        if self.quick:
            row["quick"] = True
        if self.missing or self.red:
            red = dict.fromkeys(self.red, "correctness gate red")
            row["not_measured"] = {**self.missing, **red}
        return row


def paired_ratio(baseline: Sequence[float], ours: Sequence[float]) -> Ratio:
    """The median and the quartiles of baseline[i] / ours[i]. Raises ValueError unless the rounds pair up."""
    if len(baseline) != len(ours) or not ours:
        raise ValueError(
            f"{len(baseline)} and {len(ours)} rounds do not pair; measure both in the same rounds"
        )
    ratios = [slow / fast for slow, fast in zip(baseline, ours, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0], 1)
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, q1, q3, len(ratios))


def order_of(names: Sequence[str], round_index: int) -> list[str]:
    """Who runs when in a round: everybody follows everybody else equally often, forwards and backwards."""
    shift = (round_index // 2) % len(names)
    turned = [*names[shift:], *names[:shift]]
    return turned if round_index % 2 == 0 else turned[::-1]


class Stopwatch:
    """Wall-clock seconds of one call, from an idle device to an idle device, on CUDA with a cold L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def flush(self) -> None:
        """Push everything else out of the L2 cache (asynchronous); nothing on the CPU, where rivals do that."""
        if self._flush is not None:
            self._flush.zero_()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, call: Callable[[], object]) -> float:
        self.flush()
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start


def alternate(
    calls: Mapping[str, Callable[[], object]],
    stopwatch: Callable[[Callable[[], object]], float],
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    warmups: int = 3,
) -> dict[str, list[float]]:
    """Seconds of every call in every round: until `seconds` are over, within min_rounds .. max_rounds rounds."""
    names = list(calls)
    for name in names:
        for _ in range(warmups):
            stopwatch(calls[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for index in range(max_rounds):
            if index >= min_rounds and time.perf_counter() - begin > seconds:
                break
            for name in order_of(names, index):
                times[name].append(stopwatch(calls[name]))
    finally:
        gc.enable()
    return times


def copy_elements(device: torch.device) -> int:
    """Size of the large copy, in float32 elements."""
    return COPY_ELEMENTS[device.type]


def large_copy(device: torch.device) -> Callable[[], object]:
    """The call whose time tells the memory bandwidth."""
    source = torch.ones(copy_elements(device), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


@dataclass
class Provider:
    """One rival, built and ready. `gate` raises GateError; `call` does the case's work once. `device_part`: the same
    without the host's share, where a CUDA graph can capture it; timed less `device_base`. `after_capture` is called
    then, before the first replay. `never_waits`: red if it waits for the device.
    """

    gate: Callable[[], None]
    call: Callable[[], object]
    device_part: Callable[[], object] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    never_waits: bool = False
    device_base: Callable[[], object] = lambda: None
    after_capture: Callable[[], object] = lambda: None


def measure(
    case: Case,
    builders: Mapping[str, Callable[[], Provider]],
    settings: Settings,
    conditions: Mapping[str, Any],
) -> Measured:
    """Build the providers, ours first, refuse the red ones, time the others in alternating rounds.

    A rival that fails, or takes longer than BENCH_RIVAL_SECONDS, is missing, and the others are measured.
    """
    measured = Measured(case, settings.device, conditions, {}, quick=settings.quick)
    stopwatch = Stopwatch(settings.device)
    providers: dict[str, Provider] = {}
    for name in sorted(builders, key=lambda name: name != OURS):
        try:
            with at_most(float("inf") if name == OURS else rival_seconds()):
                provider = builders[name]()
                provider.gate()
                if settings.device.type == "cuda":
                    _count(name, provider, measured, stopwatch)
        except Unavailable as reason:
            measured.missing[name] = str(reason)
        except GateError as error:
            measured.red[name] = str(error)
        except Exception as error:  # ours is to be mended, a rival's failure is its own
            told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            (measured.red if name == OURS else measured.missing)[name] = told
        else:
            providers[name] = provider
            measured.facts.setdefault(name, {}).update(provider.facts)
    if providers:
        calls = {name: provider.call for name, provider in providers.items()}
        calls[COPY] = large_copy(settings.device)
        measured.times = alternate(
            calls, stopwatch, settings.seconds, settings.min_rounds, settings.max_rounds
        )
    return measured


def _count(name: str, provider: Provider, measured: Measured, stopwatch: Stopwatch) -> None:
    for _ in range(3):  # autotuning and first allocations wait
        provider.call()
    if provider.never_waits:
        counts.refuse_waiting(provider.call)
    facts = measured.facts.setdefault(name, {})
    facts["host_syncs"] = counts.host_syncs(provider.call)
    facts |= counts.launches(provider.call)
    facts["host_time_s"] = counts.host_time(provider.call)
    if provider.device_part is not None:
        facts |= counts.graph_time(provider.device_part, stopwatch.flush, provider.after_capture)


class ReplayClock:
    """A timer whose time passes only in `advance`: pytest-benchmark then records the durations that were measured.

    The providers of a case have to alternate, but pytest-benchmark runs one test after the other. So the rounds are
    measured first, and each test lets its own provider's seconds pass once more on this clock.
    """

    __name__ = (
        "replayed seconds of the alternating rounds"  # what pytest-benchmark prints as its timer
    )

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, durations: Sequence[float]) -> Callable[[], None]:
        """A function that takes durations[0] in its first call, durations[1] in its second, and so on."""
        remaining: Iterator[float] = iter(durations)

        def advance() -> None:
            self.now += next(remaining)

        return advance
