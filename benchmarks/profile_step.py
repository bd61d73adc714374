"""Where the time of a training step goes: `python -m benchmarks.profile_step --model S/2 --batch 16`.

Prints time by category, launches and host syncs of one step (on a CPU: time and operations) as a table, then as JSON.
On a GPU the time is that of its kernels; what the wall clock has beyond them is `idle`. An operation belongs to the
optimizer if the optimizer or the EMA called it, else to what its name says. The loss of plain providers is elementwise
operations like any other; only our fused ops can be told apart as diffusion ops.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch._C._autograd import DeviceType

from benchmarks import gpu_counts
from benchmarks import train_step_providers as rivals
from benchmarks.harness import Stopwatch, Unavailable
from benchmarks.train_step_measure import tf32
from benchmarks.train_step_memory import OURS, PLAIN
from benchmarks.train_step_ours import ours
from benchmarks.train_step_problem import Arena, TrainCase, make_problem, make_state, shapes_of
from benchmarks.train_step_providers import Trainer
from speed_engine.models import dit
from speed_engine.processes import Processes, start, stop

MATRIX, ATTENTION, NORM = "matrix products", "attention", "norm and elementwise"
DIFFUSION, OPTIMIZER, OTHER = "diffusion ops", "optimizer and EMA", "other"
IDLE, UNSEEN = "idle", "not recorded"
CATEGORIES = (MATRIX, ATTENTION, NORM, DIFFUSION, OPTIMIZER, OTHER)
# The first that matches an operation's or a kernel's name.
NAMES: tuple[tuple[str, str], ...] = (
    (
        OPTIMIZER,
        r"adam|multi_tensor|foreach|square_sum|^(update|update_list|square|square_total|prepare)_kernel",
    ),
    (DIFFUSION, r"speed_kernels::(noise|.*loss)|^(noise|loss)_kernel"),
    (ATTENTION, r"flash|fmha|attention|mha_|softmax"),
    (
        MATRIX,
        r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|triton_tem|::(addmm|mm|bmm|baddbmm|matmul|linear)|conv|mkldnn",
    ),
    (
        NORM,
        r"norm|^(forward|backward|column_sum)\w*_kernel|gelu|silu|sigmoid|elementwise|reduce|triton_|cpp_fused|glue|modulat|kernel_impl|"
        r"::(mul|add|sub|div|neg|sum|mean|exp|log|tanh|cat|copy_|_to_copy|fill_|zero_|where|pow|sqrt|clamp|index|"
        r"lerp|addcmul|embedding|cos|sin|square|le|lt|gt|eq|clone|stack|select_backward|slice_backward|randn|normal_|"
        r"arange|minimum|maximum|rsub|reciprocal|addcdiv)",
    ),
)
SCOPES = re.compile(r"Optimizer\.step|^ema$")


def category(name: str, scopes: Iterable[str] = ()) -> str:
    """What an operation or kernel called `name`, inside the named scopes, is for."""
    if any(SCOPES.search(scope) for scope in scopes):
        return OPTIMIZER
    for which, pattern in NAMES:
        if re.search(pattern, name, re.IGNORECASE):
            return which
    return OTHER


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


def profile(step: Callable[[], object], device: torch.device, steps: int) -> dict[str, Any]:
    """`milliseconds`, `calls` and `longest` of one step, the mean of `steps`."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events: Any = recorded.events()
    parts = list(on_gpu(events) if device.type == "cuda" else on_cpu(events))
    seconds: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    calls: Counter[str] = Counter()
    by_name: dict[tuple[str, str], float] = defaultdict(float)
    for name, scopes, microseconds in parts:
        what = category(name, scopes)
        seconds[what] += microseconds / 1e3 / steps
        calls[what] += 1
        by_name[name, what] += microseconds / 1e3 / steps
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    return {
        "milliseconds": seconds,
        "calls": {what: calls[what] / steps for what in CATEGORIES},
        "longest": [(name, what, value) for (name, what), value in longest],
    }


def _scopes(event: Any) -> list[str]:
    found = []
    while (event := event.cpu_parent) is not None:
        found.append(event.name)
    return found


def on_cpu(events: Iterable[Any]) -> Iterable[tuple[str, list[str], float]]:
    """(name, enclosing names, microseconds of its own) of every operation on the host."""
    for event in events:
        if event.self_cpu_time_total > 0 and not event.name.startswith(("ProfilerStep", "##")):
            yield event.name, _scopes(event), float(event.self_cpu_time_total)


def on_gpu(events: Iterable[Any]) -> Iterable[tuple[str, list[str], float]]:
    """(name, names of what launched it, microseconds) of every kernel and copy.

    Those that no operation launched, as from a CUDA graph, have their name alone.
    """
    events = list(events)
    launched: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                launched[kernel.name] += 1
                yield kernel.name, [event.name, *_scopes(event)], float(kernel.duration)
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if launched[event.name] > 0:
                launched[event.name] -= 1
            elif not getattr(event, "is_user_annotation", False):
                yield event.name, [], float(event.device_time_total)


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
        busy = sum(found["milliseconds"].values())
        rest = IDLE if device.type == "cuda" else UNSEEN
        found["milliseconds"][rest] = max(0.0, wall - busy)
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
