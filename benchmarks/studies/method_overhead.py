"""What a time-step method costs in time: steps with it and steps with `uniform`, in turns, in one process.

    python -m benchmarks.studies.method_overhead --method adaptive --set data.path=DIR --out overhead.json

Both train the same network from the same seed through the project's loop. They take turns in blocks of 40 steps, the
default interval between two lessons of `adaptive`, so that each of its blocks has one lesson and each period of 200
steps one sweep. The extra cost is the paired ratio of the blocks less one; periods are reported one by one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import order_of
from benchmarks.studies.loss_curves import Contender, prepare
from speed_engine.atomic_files import write_json
from speed_engine.config import load
from speed_engine.distributed import start, stop
from speed_engine.errors import told_in_one_sentence
from speed_engine.training import assembly

BLOCK, PERIOD = 40, 200


def measure(contenders: list[Contender], steps: int) -> None:
    """Blocks in turns, in an order that turns around, with a line a block."""
    by_value = {one.value: one for one in contenders}
    for number, done in enumerate(range(0, steps, BLOCK)):
        for value in order_of(list(by_value), number):
            by_value[value].advance(BLOCK)
        now = ", ".join(f"{one.value} {one.seconds[-1] * 1e3:.1f} ms" for one in contenders)
        print(f"step {done + BLOCK}/{steps}: {now}", file=sys.stderr, flush=True)


def summary(plain: list[float], method: list[float]) -> dict[str, Any]:
    """Seconds a step of each block -> the extra share: of each period, and over all blocks.

    The first block of each warms up and is left out of `extra`, not of `extra_by_period`.
    """
    ratios = [b / a for a, b in zip(plain, method, strict=True)]
    quarters = statistics.quantiles(ratios[1:], n=4)
    blocks = PERIOD // BLOCK
    periods = range(0, len(plain), blocks)
    return {
        "extra": statistics.median(ratios[1:]) - 1,
        "extra_quartiles": [quarters[0] - 1, quarters[2] - 1],
        "extra_by_period": [
            sum(method[i : i + blocks]) / sum(plain[i : i + blocks]) - 1 for i in periods
        ],
        "extra_of_all_steps": sum(method) / sum(plain) - 1,
    }


def compare(options: argparse.Namespace) -> int:
    """Measure, print, write. Raises ValueError for a user's mistakes."""
    if options.steps < PERIOD or options.steps % PERIOD:
        raise ValueError(f"--steps {options.steps} must be a multiple of {PERIOD}")
    own = [*options.set, "engine.kind=torch", f"train.steps={options.steps}"]
    kinds = ("uniform", options.method)
    configs = [load(options.preset, [*own, f"timesteps.kind={kind}"]) for kind in kinds]
    processes = start(configs[0].engine.device)
    try:
        source = assembly.build_source(configs[0])
        contenders = [
            prepare(kind, config, source, processes, changing=True)
            for kind, config in zip(kinds, configs, strict=True)
        ]
        measure(contenders, options.steps)
    finally:
        stop(together=False)
    plain, method = contenders
    result = {
        "method": options.method,
        "preset": configs[0].name,
        "samples_per_step": configs[0].train.global_batch,
        "steps": options.steps,
        "block": BLOCK,
        **summary(plain.seconds, method.seconds),
        "seconds_per_step_of_blocks": {one.value: one.seconds for one in contenders},
        "config_of_the_method": configs[1].model_dump(mode="json", exclude={"data", "run_dir"}),
        "conditions": conditions(processes.device),
    }
    for key in ("extra", "extra_quartiles", "extra_by_period", "extra_of_all_steps"):
        print(f"{key:20s} {result[key]}")
    if options.out:
        write_json(options.out, result)
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="what a time-step method costs in time")
    parser.add_argument("--method", default="adaptive", help="timesteps.kind to measure")
    parser.add_argument("--preset", default="digits_dit_tiny", help="a preset, or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="may be repeated"
    )
    parser.add_argument("--steps", type=int, default=600, help=f"a multiple of {PERIOD}")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    return told_in_one_sentence(lambda: compare(options))


if __name__ == "__main__":
    sys.exit(main())
