"""The host's share of a step on a GPU, measured without one: processor time of a step whose launches do nothing.

    python -m benchmarks.train_step.host_share --model XL/2 --out after.json
    python -m benchmarks.train_step.host_share --model XL/2 --before before.json --out host-share.json
    python -m benchmarks.train_step.host_share --join s2.json xl2.json --out both.json
    python -m benchmarks.train_step.host_share --model XL/2 --profile          # where it goes, by function

A stand-in for Triton's driver specialises, compiles and "loads" the kernels and notes their launches. Products and
attention allocate their results and compute nothing (no_products.cpp). The network has the depth and all tensors of
`--model`, but 64 channels and 16 tokens of one sample, so that what torch's other operations compute is next to nothing
beside what they cost to call. In the number: Python, autograd, torch's dispatch, allocation on the host, Triton's
launcher up to the driver. Left out: the driver's own time for each launch (counted, but not timed), the meter, whose
rows the kernels did not write, and the reading of data, which another thread does. It is the processor time of all
threads, not the wall's; the least of `--steps`, so that other work on the machine counts little. What `--before` names
is this command's file of another commit.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from speed_kernels import build
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.environment import ROOT, conditions
from speed_engine.atomic_files import write_json
from speed_engine.distributed import start, stop
from speed_engine.models import dit
from speed_engine.training import metrics

ALLOCATE = {"empty", "empty_like", "empty_strided", "detach", "_unsafe_view", "new_empty"}
WIDTH, HEADS, SAMPLE_SIZE, BATCH = 64, 1, 8, 1


def stand_in() -> ModuleType:
    """The driver's stand-in, which the kernels' tests have; installed."""
    spec = importlib.util.spec_from_file_location("stand_in", ROOT / "tests/kernels/stand_in.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["stand_in"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
    return module


def no_products() -> None:
    """From now on torch's products and attention on the CPU allocate and do not compute. Needs a C++ compiler."""
    source = Path(__file__).with_name("no_products.cpp")
    command, _ = build.compiler()
    folders = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "no_products.so"
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC"]
        subprocess.run(
            [command, *flags, *folders, str(source), "-o", str(target), *libraries], check=True
        )
        torch.ops.load_library(target)


class Launches(TorchDispatchMode):
    """Counts torch's operations that a GPU would launch: those that return memory of their own, or write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in ALLOCATE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def measure(model: str, steps: int, profile: bool = False) -> dict[str, Any]:
    """`host_ms` (the least), `median_ms`, `launches` by kernel and `operations` of torch that would launch as well, of
    one step of engine torch in bf16. profile: print where the time goes, too."""
    no_products()
    driver = stand_in()
    from benchmarks.train_step.ours import ours
    from benchmarks.train_step.problem import TrainCase, make_problem

    named = dit.SIZES[model]
    dit.SIZES[model] = named._replace(hidden_size=WIDTH, num_heads=HEADS)
    metrics.Meter.add = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    processes = start("cpu")
    try:
        case = TrainCase("host", model, BATCH, ("cpu",), SAMPLE_SIZE)
        trainer = ours("torch", make_problem(case, processes.device), processes)
        for _ in range(3):
            trainer.step()
        seconds = []
        for _ in range(steps):
            driver.RECORD.launched.clear()
            begin = time.process_time()
            trainer.step()
            seconds.append(time.process_time() - begin)
        launches = Counter(name for name, _, _ in driver.RECORD.launched)
        with Launches() as operations:
            trainer.step()
        if profile:
            _print_profile(trainer.step, steps)
    finally:
        stop(together=True)
    return {
        "model": model,
        "depth": named.depth,
        "host_ms": 1e3 * min(seconds),
        "median_ms": 1e3 * sorted(seconds)[len(seconds) // 2],
        "launches": dict(sorted(launches.items())),
        "operations": dict(operations.names.most_common()),
        "steps": steps,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "conditions": conditions(processes.device),
    }


def _print_profile(step: Callable[[], Any], steps: int) -> None:
    """By own time, the autograd thread's included on the CPU, where the backward pass runs in the calling one."""
    watch = cProfile.Profile(time.process_time)
    watch.enable()
    for _ in range(steps):
        step()
    watch.disable()
    pstats.Stats(watch).sort_stats("tottime").print_stats(45)


def page(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "# Host share of a training step",
        "",
        "Processor time of a step on a stand-in for the GPU's driver, the least and the median of many. Products and",
        "attention allocate and do not compute. In it: Python, autograd, torch's dispatch, allocation, Triton's",
        "launcher. Not in it: the driver's time for a launch, the meter, the reading of data. One sample, 64 channels,",
        "the model's depth, engine torch in bf16 without a captured graph; no GPU. Made by",
        "`python -m benchmarks.train_step.host_share`.",
        "",
        "| model | | commit | ms a step | median | steps | load of the machine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for name, each in (("before", result.get("before")), ("after", result)):
            if each:
                found = [f"{each['host_ms']:.2f}", f"{each['median_ms']:.2f}", str(each["steps"])]
                found += [f"{each['load']:.0f} on {each['cores']} cores"]
                commit = each["conditions"]["commit"][:7]
                lines.append(f"| {result['model']} | {name} | {commit} | {' | '.join(found)} |")
    for result in results:
        launches, operations = sum(result["launches"].values()), sum(result["operations"].values())
        lines += ["", f"DiT-{result['model']}: {launches} Triton launches a step", ""]
        lines += [f"- `{name}`: {count}" for name, count in result["launches"].items()]
        lines += ["", f"and {operations} operations of torch that would launch, too:", ""]
        lines += [f"- `{name}`: {count}" for name, count in result["operations"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="processor time of a step without its GPU")
    parser.add_argument("--model", default="S/2", choices=sorted(dit.SIZES))
    parser.add_argument("--steps", type=int, default=40, help="measured, after three")
    parser.add_argument("--before", type=Path, help="what this command wrote at another commit")
    parser.add_argument("--out", type=Path, help="write here, and a page beside it")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, too")
    parser.add_argument(
        "--join", type=Path, nargs="+", help="measure nothing: a page of these files"
    )
    options = parser.parse_args(arguments)
    if options.join:
        results = [each for file in options.join for each in json.loads(file.read_text())]
    else:
        results = [measure(options.model, options.steps, options.profile)]
    if options.before:
        (results[0]["before"],) = json.loads(options.before.read_text())
    print(page(results))
    if options.out:
        write_json(options.out, results)
        options.out.with_suffix(".md").write_text(page(results))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # what the stand-in holds has no orderly end
