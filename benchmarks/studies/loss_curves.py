"""What one setting does to the loss and to the time of a step: its values trained side by side, compared in pairs.

    python -m benchmarks.studies.loss_curves --compare model.products=native,fp8_row --set data.path=DIR

Every value gets a run of its own through the project's loop, from the same seed: same first weights, same samples,
same time steps and noise in every step. So the losses of a step differ by the setting alone, and the difference of
two curves is far less noisy than each curve. The runs take turns in blocks of steps inside one process, in an order
that turns around: what disturbs the machine disturbs all of them.

Writes every step's loss, the blocks' seconds and the summary as JSON, and a picture; prints the summary as a table.
One seed is one sample: nothing here tells how the difference would vary from seed to seed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import order_of, paired_ratio
from benchmarks.studies.loss_picture import draw
from speed_engine.atomic_files import write_json
from speed_engine.config import RunConfig, load
from speed_engine.data import Batch
from speed_engine.distributed import Processes, start, stop
from speed_engine.errors import told_in_one_sentence
from speed_engine.training import assembly, metrics
from speed_engine.training.step import DiffusionStep

# Of other sections the runs would not see the same batches, or their losses would not be the same quantity.
SECTIONS = ("model", "engine", "optim", "kernels")
FINAL_SHARE = 0.1  # the steps at the end that the summary is about
GROUPS = 10  # of consecutive steps, for the standard error of the difference


@dataclass
class Contender:
    """One value of the setting: a run in the making."""

    value: str
    config: RunConfig
    do: DiffusionStep
    meter: metrics.Meter
    batches: Iterator[Batch]
    losses: list[float] = field(default_factory=list)  # of every step
    seconds: list[float] = field(default_factory=list)  # a step, of every block
    skipped: int = 0

    def advance(self, steps: int) -> None:
        """Do a block of steps, on the clock. Waits for the device at the beginning and the end."""
        sums, done = self.meter.sums, len(self.losses)
        device, kept = sums.device, []
        _wait(device)
        begin = time.perf_counter()
        for step in range(done, done + steps):
            self.do(step, self.batches)
            kept.append(sums.sum(0))  # of all lanes
            sums.zero_()  # outside of the step, which may be a CUDA graph
        _wait(device)
        self.seconds.append((time.perf_counter() - begin) / steps)
        total, _, _, samples = torch.stack(kept).T
        self.losses += (total / samples).tolist()
        self.skipped = self.do.engine.num_skipped()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse_comparison(text: str) -> tuple[str, list[str]]:
    """`section.key=a,b` -> (section.key, [a, b]). Raises ValueError for what cannot be compared."""
    key, equals, listed = text.partition("=")
    values = [value.strip() for value in listed.split(",")]
    if not equals or len(values) < 2 or not all(values) or len(set(values)) < len(values):
        raise ValueError(
            f"cannot compare {text!r}; write it as section.key=VALUE,VALUE with different values"
        )
    if key.split(".")[0] not in SECTIONS or key == "engine.device":
        raise ValueError(
            f"--compare {key}: the runs would not see the same batches and losses on the same "
            f"device; compare a key of {', '.join(SECTIONS)} (but not engine.device)"
        )
    return key, values


def prepare(
    value: str, config: RunConfig, source: Any, processes: Processes, changing: bool = False
) -> Contender:
    """The parts of a run as the training loop puts them together, without its files.

    Raises ValueError for a time-step method that changes while it trains, unless `changing`.
    """
    parts = assembly.build(config, processes, source)
    if parts.table.changes and not changing:
        raise ValueError(
            f"timesteps.kind={config.timesteps.kind} changes with the losses it sees, so the runs "
            "would not draw the same time steps; choose another, as --set timesteps=uniform"
        )
    do = assembly.open_step(parts, assembly.open_engine(parts))
    if getattr(config.engine, "cuda_graph", False):
        do = do.captured()
    return Contender(value, config, do, do.meter, parts.loader.batches(0, config.train.steps))


def run(contenders: Sequence[Contender], steps: int, block: int) -> None:
    """All contenders to the end, in turns of `block` steps; a line of progress after each round."""
    by_value = {one.value: one for one in contenders}
    with contextlib.ExitStack() as stack:
        for one in contenders:
            stack.enter_context(contextlib.closing(one.batches))  # pyright: ignore[reportArgumentType]
        for number, done in enumerate(range(0, steps, block)):
            for value in order_of(list(by_value), number):
                by_value[value].advance(min(block, steps - done))
            now = [f"{one.value} {statistics.fmean(one.losses[done:]):.4f}" for one in contenders]
            print(
                f"step {min(done + block, steps)}/{steps}: {', '.join(now)}",
                file=sys.stderr,
                flush=True,
            )


# ------------------------------------------------------------------ what came out


@dataclass(frozen=True)
class Outcome:
    """One value against the first one. Times are medians over the blocks, without the first block."""

    value: str
    final_loss: float  # mean over the last FINAL_SHARE of the steps
    difference: float  # to the first value, over the same steps
    standard_error: float  # of that difference, from GROUPS means; nan for fewer than two steps
    seconds: float  # a step
    time_ratio: float  # time of the first value / time of this one, paired by blocks
    skipped: int  # updates whose gradients were not finite


def standard_error(differences: Sequence[float], groups: int = GROUPS) -> float:
    """Standard error of the mean of paired differences, from the means of consecutive groups.

    Neighbouring steps have neighbouring weights, so their differences are not independent; the means
    of groups much longer than that memory are. Up to groups - 1 steps at the start are left out.
    """
    groups = min(groups, len(differences))
    if groups < 2:
        return math.nan
    size = len(differences) // groups
    kept = differences[len(differences) - groups * size :]
    means = [statistics.fmean(kept[i : i + size]) for i in range(0, len(kept), size)]
    return statistics.stdev(means) / math.sqrt(groups)


def summarise(contenders: Sequence[Contender]) -> list[Outcome]:
    """Every value against the first."""
    first, outcomes = contenders[0], []
    last = max(1, round(FINAL_SHARE * len(first.losses)))
    warm = 1 if len(first.seconds) > 1 else 0  # the first block compiles, and fills caches
    for one in contenders:
        pairs = zip(one.losses[-last:], first.losses[-last:], strict=True)
        differences = [a - b for a, b in pairs]
        outcomes.append(
            Outcome(
                one.value,
                statistics.fmean(one.losses[-last:]),
                statistics.fmean(differences),
                standard_error(differences),
                statistics.median(one.seconds[warm:]),
                paired_ratio(first.seconds[warm:], one.seconds[warm:]).median,
                one.skipped,
            )
        )
    return outcomes


def as_table(key: str, outcomes: Sequence[Outcome], steps: int) -> str:
    """The outcomes as a Markdown table."""
    last = max(1, round(FINAL_SHARE * steps))
    lines = [
        f"| {key} | mean loss, last {last} steps | difference | standard error | s/step | speed | skipped |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in outcomes:
        against = f"{one.difference:+.2e} | {one.standard_error:.1e}"
        if one is outcomes[0]:
            against = "- | -"
        lines.append(
            f"| {one.value} | {one.final_loss:.5f} | {against} "
            f"| {one.seconds:.4g} | {one.time_ratio:.3f} | {one.skipped} |"
        )
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    """`value` with null for what JSON cannot say."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------ the command


def compare(options: argparse.Namespace) -> int:
    """Train, write, print. Raises ValueError for a user's mistakes."""
    key, values = parse_comparison(options.compare)
    if options.steps < 1 or options.block < 1:
        raise ValueError("--steps and --block must be at least 1")
    own = ["validation.every=0", *options.set, f"train.steps={options.steps}"]
    configs = [load(options.preset, [*own, f"{key}={value}"]) for value in values]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    processes = start(configs[0].engine.device)
    try:
        if processes.world > 1:
            raise ValueError("the runs are compared inside one process; start it without launcher")
        source = assembly.build_source(configs[0])
        pairs = zip(values, configs, strict=True)
        contenders = [prepare(value, config, source, processes) for value, config in pairs]
        run(contenders, options.steps, options.block)
        write(options, key, contenders, source.fingerprint, processes.device)
    finally:
        stop(together=False)
    return 0


def write(
    options: argparse.Namespace,
    key: str,
    contenders: Sequence[Contender],
    fingerprint: str,
    device: torch.device,
) -> None:
    """The JSON, the picture, and the table on standard output."""
    outcomes = summarise(contenders)
    config, steps = contenders[0].config, options.steps
    name = options.name or f"loss_{key}_{config.name}"
    table = as_table(key, outcomes, steps)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {
        "compared": key,
        "values": [one.value for one in contenders],
        "steps": steps,
        "block": options.block,
        "samples_per_step": config.train.global_batch,
        "summary": [vars(outcome) for outcome in outcomes],
        "losses": {one.value: one.losses for one in contenders},
        "seconds_per_step_of_blocks": {one.value: one.seconds for one in contenders},
        # No folder names: the data are what their fingerprint says.
        "config_of_the_first": config.model_dump(mode="json", exclude={"data", "run_dir"}),
        "data": fingerprint,
        "conditions": conditions(device),
    }
    write_json(options.out / f"{name}.json", _finite(report))
    curves = {one.value: one.losses for one in contenders}
    draw(key, curves, config.name, options.out / f"{name}.png")
    print(table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="loss curves of two or more values of one setting")
    parser.add_argument("--compare", required=True, metavar="SECTION.KEY=VALUE,VALUE")
    parser.add_argument("--preset", default="imagenet256_dit_s2", help="a preset, or a YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="as in training; may be repeated. data=benchmarks.harness.random_latents needs no files",
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--block", type=int, default=50, help="steps between two turns")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", help="of the two files; default: loss_KEY_PRESET")
    options = parser.parse_args()
    return told_in_one_sentence(lambda: compare(options))


if __name__ == "__main__":
    sys.exit(main())
