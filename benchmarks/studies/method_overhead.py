"""What time-step methods cost in time: steps with each and steps with `uniform`, in turns, in one process.

    python -m benchmarks.studies.method_overhead --set data.path=DIR --out overhead.json

All methods of a study file train the same network from the same seed through the project's loop. They take turns in
blocks of 40 steps, the default interval between two lessons of `adaptive`, so that each of its blocks has one lesson
and each period of 200 steps one sweep. The extra cost of a method is the paired ratio of its blocks to those of the
study's baseline less one; periods are reported one by one.
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
from speed_engine.config import build, load, merge
from speed_engine.distributed import start, stop
from speed_engine.errors import told_in_one_sentence
from speed_engine.studies.study import load as load_study
from speed_engine.training import assembly

BLOCK, PERIOD = 40, 200


def measure(contenders: dict[str, Contender], steps: int) -> None:
    """Blocks in turns, in an order that turns around, with a line a block."""
    for number, done in enumerate(range(0, steps, BLOCK)):
        for name in order_of(list(contenders), number):
            contenders[name].advance(BLOCK)
        now = ", ".join(f"{name} {one.seconds[-1] * 1e3:.1f}" for name, one in contenders.items())
        print(f"step {done + BLOCK}/{steps}, ms a step: {now}", file=sys.stderr, flush=True)


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
    study = load_study(options.study)
    plain = study.reference
    unknown = [name for name in options.method if name not in study.methods]
    if unknown:
        raise ValueError(
            f"--method {unknown[0]}: the study {study.name} has {', '.join(study.methods)}"
        )
    names = [plain, *(name for name in options.method or study.methods if name != plain)]
    own = ["validation.every=0", *options.set, "engine.kind=torch", f"train.steps={options.steps}"]
    base = load(options.preset, own).model_dump(mode="json")
    configs = {name: build(merge(base, study.methods[name])) for name in names}
    processes = start(configs[plain].engine.device)
    try:
        source = assembly.build_source(configs[plain])
        contenders = {
            name: prepare(name, config, source, processes, changing=True)
            for name, config in configs.items()
        }
        measure(contenders, options.steps)
    finally:
        stop(together=False)
    of_plain = contenders[plain].seconds
    rows = {name: summary(of_plain, contenders[name].seconds) for name in names[1:]}
    result = {
        "against": plain,
        "preset": configs[plain].name,
        "samples_per_step": configs[plain].train.global_batch,
        "steps": options.steps,
        "block": BLOCK,
        "methods": rows,
        "seconds_per_step_of_blocks": {name: one.seconds for name, one in contenders.items()},
        "timesteps": {name: config.timesteps.model_dump() for name, config in configs.items()},
        "config": configs[plain].model_dump(mode="json", exclude={"data", "run_dir", "timesteps"}),
        "conditions": conditions(processes.device),
    }
    for name, row in rows.items():
        low, high = row["extra_quartiles"]
        all_steps = row["extra_of_all_steps"]
        print(
            f"{name:20s} {row['extra']:+.1%} [{low:+.1%}, {high:+.1%}], all steps {all_steps:+.1%}"
        )
    if options.out:
        write_json(options.out, result)
    return 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="what time-step methods cost in time")
    parser.add_argument("--study", default="digits", help="a shipped study, or a YAML file")
    parser.add_argument(
        "--method", action="append", default=[], help="one of its methods alone; may be repeated"
    )
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
