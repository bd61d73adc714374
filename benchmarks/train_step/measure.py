"""Times the providers of a training step: all in one process, alternating round by round, on shared memory.

Where not all of them fit (see `train_step_memory`) the reference is in both houses, so a ratio of two providers that
never met is composed of two ratios to it; the row says which ones are.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import counts as gpu_counts
from benchmarks.harness.measure import (
    COPY,
    Case,
    GateError,
    Measured,
    Settings,
    Stopwatch,
    alternate,
    copy_elements,
    large_copy,
    paired_ratio,
)
from benchmarks.train_step.build import House, build_house
from benchmarks.train_step.memory import (
    OURS,
    PLAIN,
    available_bytes,
    needed_bytes,
    peak_bytes,
    plan,
    release,
)
from benchmarks.train_step.problem import TrainCase, make_problem
from benchmarks.train_step.time_by_category import profile, with_rest
from speed_engine.distributed import Processes
from speed_engine.training import metrics

MATMULS = {
    "cpu": ((2048, 2048, 2048), (4096, 1152, 4608)),
    "cuda": ((8192, 8192, 8192), (65536, 1152, 4608), (65536, 4608, 1152)),
}


@dataclass
class TrainMeasured(Measured):
    """The rounds of all houses. `times` holds each provider's in the first house that it lived in."""

    train_case: TrainCase | None = None
    houses: list[dict[str, list[float]]] = field(default_factory=list)
    matmul_tflops: float = 0.0
    gpu: str | None = None

    def row(self, provider: str) -> dict[str, Any]:
        """The columns of one provider."""
        assert self.train_case is not None
        house = next(house for house in self.houses if provider in house)
        times, work = house[provider], self.train_case.work
        median = statistics.median(times)
        copy = 2 * 4 * copy_elements(self.device) / statistics.median(house[COPY])
        floor = work.flop / (self.matmul_tflops * 1e12) + self.case.num_bytes / copy
        tflops = work.flop / median * 1e-12
        peak = metrics.peak_tflops(self.gpu) if self.gpu else None
        datasheet, measured = tflops / peak if peak else None, tflops / self.matmul_tflops
        row = self.common(provider, times, copy, floor)
        row |= {
            "model": f"DiT-{self.train_case.size}",
            "batch": self.train_case.batch,
            "matmul_tflops": self.matmul_tflops,
            "images_per_s": self.train_case.batch / median,
            "tflops": tflops,
            "mfu_datasheet": datasheet,
            "mfu_measured": measured,
            "mfu": measured if datasheet is None else datasheet,
        }
        if self.device.type == "cpu":
            row["amx"] = has_amx()
        if provider in OURS:
            row |= self._ratios(provider)
        if len(self.houses) > 1:
            row["alternation"] = "; then ".join(
                " with ".join(name for name in each if name != COPY) for each in self.houses
            )
        return row

    def _ratios(self, provider: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        composed: list[str] = []
        house = next(house for house in self.houses if provider in house)
        baselines = [*PLAIN, *(name for name in OURS[:1] if name != provider)]
        for baseline in baselines:
            key = f"ratio_vs_{baseline.replace('-', '_')}"
            if baseline in house:
                ratio = paired_ratio(house[baseline], house[provider])
                found |= {key: ratio.median, f"{key}_q1": ratio.q1, f"{key}_q3": ratio.q3}
                continue
            other = next((each for each in self.houses if baseline in each), None)
            if other is not None and "reference" in other and "reference" in house:
                mine = paired_ratio(house["reference"], house[provider]).median
                found[key] = mine / paired_ratio(other["reference"], other[baseline]).median
                composed.append(baseline)
        if composed:
            found["ratios_composed"] = composed
        return found


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in tiles, which decides what bf16 can gain."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "amx_bf16" in information.read_text(errors="replace")


def matmul_tflops(device: torch.device) -> float:
    """The best rate of a large matrix product, in bfloat16 or float32; 2 FLOP a multiply-add."""
    stopwatch, best = Stopwatch(device), 0.0
    for dtype in (torch.bfloat16, torch.float32):
        for rows, inputs, outputs in MATMULS[device.type]:
            left = torch.randn(rows, inputs, device=device).to(dtype)
            right = torch.randn(inputs, outputs, device=device).to(dtype)
            result = torch.empty(rows, outputs, device=device, dtype=dtype)

            def multiply(
                left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = result
            ) -> None:
                torch.mm(left, right, out=out)

            seconds = min(stopwatch(multiply) for _ in range(6))
            best = max(best, 2.0 * rows * inputs * outputs / seconds * 1e-12)
    return best


def measure_case(
    case: TrainCase,
    settings: Settings,
    processes: Processes,
    conditions: Mapping[str, Any],
    wanted: Collection[str] = (*PLAIN, *OURS),
) -> TrainMeasured:
    """The `wanted` providers of one case, and the reference, against which their gate holds them."""
    device = processes.device
    torch._dynamo.reset()  # every case starts without compiled code of another
    problem = make_problem(case, device)
    named = "x".join(map(str, problem.x0.shape))
    measured = TrainMeasured(
        Case("train_step", case.name, named, "bfloat16", case.work.least_bytes),
        device,
        conditions,
        {},
        quick=settings.quick,
        train_case=case,
        matmul_tflops=matmul_tflops(device),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    )
    with tf32(device):
        for names in plan(case, device, available_bytes(device), wanted):
            needed, free = needed_bytes(case, names, device), available_bytes(device)
            if (
                device.type == "cpu" and needed > free
            ):  # the system would kill us; a GPU only refuses
                why = f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"
                new = [name for name in names if name not in measured.times]
                measured.missing |= dict.fromkeys(new, why)
                continue
            copy = large_copy(device)  # before the providers find out whether they fit
            house = build_house(names, problem, processes, settings)
            measured.missing |= house.missing
            measured.red |= house.red
            _time_house(house, copy, settings, measured)
            house.close()
            del house, copy
            release(device)
    return measured


def _time_house(
    house: House, copy: Callable[[], object], settings: Settings, measured: TrainMeasured
) -> None:
    trainers, device = house.trainers, measured.device
    if not trainers:
        return
    for name, trainer in trainers.items():
        trainer.step()
        passing = peak_bytes(trainer.step, device)
        peak = None
        if passing is not None:
            peak = passing + trainer.state_bytes() + trainer.facts["graph_pool_bytes"]
        facts = {"peak_memory_bytes": peak, "state_bytes": trainer.state_bytes(), **trainer.facts}
        if device.type == "cuda":
            facts["host_syncs"] = gpu_counts.host_syncs(trainer.step)
            facts |= gpu_counts.launches(trainer.step)
            facts["host_time_s"] = gpu_counts.host_time(trainer.step)
        measured.facts.setdefault(name, facts)
    calls = {name: trainer.step for name, trainer in trainers.items()}
    calls[COPY] = copy
    stopwatch = Stopwatch(device)
    limits = (settings.seconds, settings.min_rounds, settings.max_rounds)
    times = alternate(calls, stopwatch, *limits, warmups=1 if device.type == "cpu" else 2)
    for name, trainer in trainers.items():
        try:
            trainer.check()
        except GateError as error:
            measured.red[name] = str(error)
        wall_ms = 1e3 * statistics.median(times[name])
        spent = profile(trainer.step, device, steps=1)["milliseconds"]
        measured.facts[name].setdefault("ms_by_category", with_rest(spent, wall_ms, device))
    measured.houses.append(times)
    for name, seconds in times.items():
        measured.times.setdefault(name, seconds)


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Inside, float32 products may be in TF32 on a GPU, as public trainers have it."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
