"""The host's share of a step on a GPU, bounded without one: processor time of a step whose launches do nothing.

    python -m benchmarks.train_step.host_share --model XL/2 --out after.json
    python -m benchmarks.train_step.host_share --model XL/2 --before before.json --out host-share.json

A stand-in for Triton's driver specialises, compiles and "loads" the kernels and notes their launches. The network has
the depth and all tensors of `--model`, but 64 channels and 16 tokens. Torch's own operations, products and attention
among them, are computed by the processor here and are in the number, so that it is an upper bound: two commits can be
compared by it, no goal for a GPU's host can be judged. It is the processor time of all threads, not the wall's: the
least of `--steps`, so that other work on the machine counts little. Left out: the meter, whose rows the kernels did not
write, and the driver's own launches. What `--before` names is this command's file of another commit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.harness.environment import ROOT, conditions
from speed_engine.atomic_files import write_json
from speed_engine.distributed import start, stop
from speed_engine.models import dit
from speed_engine.training import metrics

WIDTH, HEADS, SAMPLE_SIZE, BATCH = 64, 1, 8, 1


def stand_in() -> ModuleType:
    """The driver's stand-in, which the kernels' tests have; installed."""
    spec = importlib.util.spec_from_file_location("stand_in", ROOT / "tests/kernels/stand_in.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["stand_in"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
    return module


def measure(model: str, steps: int) -> dict[str, Any]:
    """`host_ms` (the least), `median_ms`, and `launches` by kernel, of one step of engine torch in bf16."""
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
    finally:
        stop(together=True)
    launches = Counter(name for name, _, _ in driver.RECORD.launched)
    return {
        "model": model,
        "depth": named.depth,
        "host_ms": 1e3 * min(seconds),
        "median_ms": 1e3 * sorted(seconds)[len(seconds) // 2],
        "launches": dict(sorted(launches.items())),
        "steps": steps,
        "conditions": conditions(processes.device),
    }


def page(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"# Host share of a training step, DiT-{result['model']}",
        "",
        f"Processor time of a step on a stand-in for the GPU's driver, least of {result['steps']},",
        "with torch's own products on the processor: an upper bound, and no time of a GPU.",
        "",
        "| | commit | ms a step | median |",
        "| --- | --- | --- | --- |",
    ]
    for name, each in (("before", result.get("before")), ("after", result)):
        if each:
            commit = each["conditions"]["commit"][:7]
            lines.append(f"| {name} | {commit} | {each['host_ms']:.2f} | {each['median_ms']:.2f} |")
    lines += ["", f"{sum(result['launches'].values())} Triton launches a step:", ""]
    lines += [f"- `{name}`: {count}" for name, count in result["launches"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="processor time of a step without its GPU")
    parser.add_argument("--model", default="S/2", choices=sorted(dit.SIZES))
    parser.add_argument("--steps", type=int, default=40, help="measured, after three")
    parser.add_argument("--before", type=Path, help="what this command wrote at another commit")
    parser.add_argument("--out", type=Path, help="write here, and a page beside it")
    options = parser.parse_args(arguments)
    result = measure(options.model, options.steps)
    if options.before:
        result["before"] = json.loads(options.before.read_text())
    print(page(result))
    if options.out:
        write_json(options.out, result)
        options.out.with_suffix(".md").write_text(page(result))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # what the stand-in holds has no orderly end
