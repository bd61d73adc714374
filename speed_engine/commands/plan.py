"""`plan`: does it fit, how long, how many bytes; then the resolved configuration. Starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from speed_engine.commands import config_arguments, configured


def _above(low: float, kind: type) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not low < value < 1e9:
            raise ValueError
        return value

    number.__name__ = f"{'whole ' if kind is int else ''}number above {low:g}:"
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    add, count, rate = parser.add_argument, _above(0, int), _above(0, float)
    add("--nodes", type=count, default=1, help="machines (default 1)")
    add("--gpus", type=count, help="GPUs, and processes, of a machine (default 1)")
    add(
        "--tflops",
        type=rate,
        help="10^12 FLOP a second that a process sustains (default: 40%% of the datasheet of this machine's GPU, or of "
        "an H100)",
    )
    add("--inside", type=rate, default=200.0, help="10^9 bytes/s a process inside a machine (200)")
    add("--network", type=rate, default=50.0, help="10^9 bytes/s of a machine's network (50)")


def run(args: argparse.Namespace) -> int:
    from speed_engine.reports import plan, plan_cost

    where = plan_cost.cluster(args.nodes, args.gpus, args.tflops, args.inside, args.network)
    return plan.run(configured(args), where, on_gpus=args.nodes > 1 or args.gpus is not None)
