"""What an engine costs beside `engine: torch`: steps that alternate between engines, each in processes of its own.

python -m benchmarks.train_step.engine_cost --model S/2 --batch 4 --world 1 2 --rounds 10
python -m benchmarks.train_step.engine_cost --model XL/2 --batch 1 --apart       # one engine's memory at a time
python -m benchmarks.train_step.engine_cost --engines torch exact --leaves 4 --world 2     # train.exact_sums on gloo

CPU alone. Each engine is a group of processes that make a step when they are told; engines take turns, in an order that
moves on, and a ratio is of steps of one round. `--apart` starts and ends them in turns instead, round by round, where
two states do not fit; the ratio is then of medians of a round. Beside time: processor seconds, and fresh pages, which
are memory that the process gave back and asked for again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import conditions

WARM_UP = 3
ENGINES = {
    "torch": ["engine=torch"],
    "exact": ["engine=torch", "train.exact_sums=true"],
    **{f"zero{stage}": ["engine=deepspeed", f"engine.zero={stage}"] for stage in range(4)},
}


@dataclass(frozen=True)
class Step:
    """One step of the slowest process. seconds: wall clock; processor: of all threads; fresh: bytes of new pages."""

    seconds: float
    processor: float
    fresh: int


class Group:
    """The processes of one engine, waiting for orders."""

    def __init__(self, name: str, world: int, asked: argparse.Namespace) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = ["--model", asked.model, "--batch", str(asked.batch), "--leaves", str(asked.leaves)]
        words += ["--precision", asked.precision]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        place |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world))}
        place |= {"DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "benchmarks.train_step.engine_cost", "--work", name]
        self.running = [
            subprocess.Popen(
                [*command, *words],
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def step(self) -> Step:
        """Raises RuntimeError where a process has ended; what it said stands above."""
        for each in self.running:
            assert each.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                each.stdin.write("step\n")
                each.stdin.flush()
        found = [Step(**self._answer(each)) for each in self.running]
        return max(found, key=lambda step: step.seconds)

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        raise RuntimeError(f"a process of {process.args[4]} ended")  # pyright: ignore

    def end(self) -> None:
        for each in self.running:
            each.kill()
        for each in self.running:
            each.wait()


@contextlib.contextmanager
def groups(names: list[str], world: int, asked: argparse.Namespace) -> Iterator[dict[str, Group]]:
    """Warm ones, gone afterwards."""
    found: dict[str, Group] = {}
    try:
        for name in names:
            found[name] = Group(name, world, asked)
        for _ in range(WARM_UP):
            for group in found.values():
                group.step()
        yield found
    finally:
        for group in found.values():
            group.end()


def measure(world: int, asked: argparse.Namespace) -> dict[str, list[list[Step]]]:
    """Engine -> round -> steps."""
    found: dict[str, list[list[Step]]] = {name: [] for name in asked.engines}
    if asked.apart:
        for _ in range(asked.rounds):
            for name in asked.engines:
                with groups([name], world, asked) as alone:
                    found[name].append([alone[name].step() for _ in range(asked.steps)])
        return found
    with groups(asked.engines, world, asked) as together:
        for number in range(asked.rounds):
            turn = number % len(asked.engines)
            for name in [*asked.engines[turn:], *asked.engines[:turn]]:
                found[name].append([together[name].step()])
    return found


def rows(found: dict[str, list[list[Step]]], world: int) -> list[dict[str, Any]]:
    """One an engine, its ratios to the first engine's steps of the same round."""
    first = next(iter(found.values()))
    result = []
    for name, rounds in found.items():
        medians = [statistics.median(step.seconds for step in steps) for steps in rounds]
        others = [statistics.median(step.seconds for step in steps) for steps in first]
        ratios = sorted(a / b for a, b in zip(medians, others, strict=True))
        each = [step for steps in rounds for step in steps]
        result.append(
            {
                "engine": name,
                "processes": world,
                "seconds": statistics.median(step.seconds for step in each),
                "ratio": statistics.median(ratios),
                "ratio_from_to": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
                "processor_seconds": statistics.median(step.processor for step in each),
                "fresh_bytes": statistics.median(step.fresh for step in each),
                "steps": [asdict(step) for step in each],
            }
        )
    return result


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| engine | processes | s a step | ratio [quartiles] | processor s | fresh MB a step |"
    ]
    lines.append("| --- " * 6 + "|")
    for row in found:
        low, high = row["ratio_from_to"]
        lines.append(
            f"| {row['engine']} | {row['processes']} | {row['seconds']:.3f} | {row['ratio']:.3f} "
            f"[{low:.3f}, {high:.3f}] | {row['processor_seconds']:.3f} | {row['fresh_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def work(asked: argparse.Namespace) -> None:
    """One process of an engine: a step for every line of its input, told as a line of JSON."""
    from benchmarks.train_step.ours import OurLoop, open_step, overrides
    from benchmarks.train_step.problem import TrainCase, make_problem
    from speed_engine import config as configuration
    from speed_engine.distributed import start
    from speed_engine.engines.host_memory import keep_freed_memory

    processes = start("cpu")
    keep_freed_memory(processes.device)  # as the trainer does
    case = TrainCase("cost", asked.model, asked.batch, ("cpu",))
    kind = "deepspeed" if asked.work.startswith("zero") else "torch"
    ours = ("engine=", "engine.zero=", "engine.precision=", "train.global_batch=")
    given = [each for each in overrides(kind, case, processes.device) if not each.startswith(ours)]
    settings = [*ENGINES[asked.work], *given, f"engine.precision={asked.precision}"]
    settings.append(f"train.global_batch={asked.batch * processes.world}")
    if asked.leaves > 1:
        settings.append(f"train.micro_batch={asked.batch // asked.leaves}")
    config = configuration.load("imagenet256_dit_xl2", settings)
    micro = TrainCase(case.name, case.size, asked.batch // asked.leaves, case.devices)
    problem = make_problem(micro, processes.device)
    do, _, _ = open_step(config, problem, processes)
    loop = OurLoop(do, problem, processes)
    for _ in sys.stdin:
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        loop.step()
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        fresh = (after.ru_minflt - before.ru_minflt) * resource.getpagesize()
        print(json.dumps(asdict(Step(seconds, spent, fresh))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="S/2")
    parser.add_argument("--batch", type=int, default=4, help="samples of one process")
    parser.add_argument("--leaves", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2])
    usual = [name for name in ENGINES if name != "exact"]
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=usual)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--apart", action="store_true", help="one engine's memory at a time")
    parser.add_argument("--steps", type=int, default=3, help="of a round, with --apart")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--work", choices=ENGINES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.batch % asked.leaves:
        parser.error(f"--leaves {asked.leaves} does not divide --batch {asked.batch}")
    if asked.work:
        work(asked)
        return
    found = [row for world in asked.world for row in rows(measure(world, asked), world)]
    print(table(found))
    if asked.out:
        told = {"asked": vars(asked) | {"out": None}, "rows": found}
        told["conditions"] = conditions(torch.device("cpu"))
        asked.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
