"""Where the time of a training step goes: `python -m benchmarks.train_step.profile_step --model S/2 --batch 16`.

Prints time by category (see `time_by_category`), launches and host syncs of one step (on a CPU: time and operations)
as a table, then as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor

from benchmarks.harness import counts as gpu_counts
from benchmarks.harness.measure import Stopwatch, Unavailable
from benchmarks.train_step import providers as rivals
from benchmarks.train_step.measure import tf32
from benchmarks.train_step.memory import OURS, PLAIN
from benchmarks.train_step.ours import ours
from benchmarks.train_step.problem import Arena, TrainCase, make_problem, make_state, shapes_of
from benchmarks.train_step.providers import Trainer
from benchmarks.train_step.time_by_category import profile, with_rest
from speed_engine.distributed import Processes, start, stop
from speed_engine.models import dit


@dataclass
class Profile:
    """Of one step: milliseconds by category, calls by category, the longest names, and the counts of the device."""

    model: str
    batch: int
    provider: str
    device: str
    wall_ms: float
    milliseconds: dict[str, float]
    calls: dict[str, float]
    longest: list[tuple[str, str, float]]  # (name, category, milliseconds)
    counts: dict[str, Any] = field(default_factory=dict)  # launches, host_syncs ...; CUDA

    def table(self) -> str:
        """Markdown."""
        unit = "kernels" if self.device == "cuda" else "operations"
        total = sum(self.milliseconds.values())
        lines = [
            f"DiT-{self.model}, batch {self.batch}, {self.provider}, {self.device}: {self.wall_ms:.2f} ms a step",
            "",
            f"| category | ms | share | {unit} |",
            "| --- | --- | --- | --- |",
        ]
        for name, value in self.milliseconds.items():
            calls = f"{self.calls[name]:.0f}" if name in self.calls else "-"
            lines.append(f"| {name} | {value:.3f} | {100 * value / total:.1f} % | {calls} |")
        lines += ["", *(f"{name}: {value}" for name, value in self.counts.items())]
        lines += ["", "| longest | category | ms |", "| --- | --- | --- |"]
        lines += [f"| `{name[:80]}` | {what} | {value:.3f} |" for name, what, value in self.longest]
        return "\n".join(lines)


def build(case: TrainCase, provider: str, processes: Processes) -> Trainer:
    """The provider alone, not gated: a profile is no result. Raises Unavailable."""
    problem = make_problem(case, processes.device)
    if provider in OURS:
        return ours(provider.removeprefix("ours-"), problem, processes)
    state = make_state(shapes_of(case), processes.device, Arena())
    state.reset()
    if provider == "compile":
        inductor.cpp.enable_kernel_profile = True  # or compiled loops would be nowhere to be seen
        return rivals.compiled(problem, state, "default")
    return {"reference": rivals.reference, "eager": rivals.eager}[provider](problem, state)


def measure(case: TrainCase, provider: str, processes: Processes, steps: int) -> Profile:
    """Build, warm up, time, profile."""
    device = processes.device
    with tf32(device):
        trainer = build(case, provider, processes)
        for _ in range(3):
            trainer.step()
        stopwatch = Stopwatch(device)
        wall = statistics.median(stopwatch(trainer.step) for _ in range(max(3, steps))) * 1e3
        found = profile(trainer.step, device, steps)
        counts: dict[str, Any] = {}
        if device.type == "cuda":
            counts = {"host_syncs": gpu_counts.host_syncs(trainer.step)}
            counts |= gpu_counts.launches(trainer.step)
        found["milliseconds"] = with_rest(found["milliseconds"], wall, device)
        trainer.close()
    return Profile(case.size, case.batch, provider, device.type, wall, **found, counts=counts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 and one sentence where the provider cannot run."""
    parser = argparse.ArgumentParser(description="time of a training step by category")
    parser.add_argument("--model", default="S/2", choices=sorted(dit.SIZES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--provider", default="ours-torch", choices=(*PLAIN, *OURS))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=3, help="profiled steps")
    parser.add_argument("--latent", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--json", type=Path, help="write the JSON here instead of printing it")
    options = parser.parse_args(arguments)
    case = TrainCase("profile", options.model, options.batch, (), options.latent)
    processes = start(options.device)
    try:
        result = measure(case, options.provider, processes, options.steps)
    except Unavailable as reason:
        print(f"{options.provider} cannot run here: {reason}")
        return 1
    finally:
        stop(together=True)
    print(result.table())
    text = json.dumps(asdict(result), indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print("\n" + text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
