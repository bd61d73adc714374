"""The three lines on inputs so small that calls are all there is: 512 points of the plane, beside plain torch.

    python -m benchmarks.studies.small_inputs --out small.json

The network is one product, so that the loop around it is what is measured: draw, noise, predict, compare, backward.
`plain` is the loop with one weight for all, `weighted` with a weight a time step, as every method but the uniform one
needs. All take turns in blocks, in one process on one thread; a block counts the processor's time, which other work
on the machine disturbs less than a clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import order_of
from speed_engine import StepTable, diffusion_loss
from speed_engine.atomic_files import write_json

POINTS, ROWS, BLOCK = 512, 1000, 100


def loops() -> dict[str, Callable[[int], None]]:
    """One training step each, without an optimizer."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, ROWS, dtype=torch.float64), 0)
    table = StepTable.from_alphas_cumprod(alpha_bar, timesteps="uniform")
    a, b = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    weight, x0 = torch.ones(ROWS), torch.randn(POINTS, 2)
    scale = nn.Parameter(torch.ones(2))

    def network(x: Tensor, time: Tensor) -> Tensor:
        return x * scale

    def drawn() -> tuple[Tensor, Tensor]:
        t, eps = torch.randint(0, ROWS, (POINTS,)), torch.randn_like(x0)
        return t, network(a[t, None] * x0 + b[t, None] * eps, t) - eps

    def done(loss: Tensor) -> None:
        loss.backward()
        scale.grad = None

    def plain(step: int) -> None:
        done(drawn()[1].square().mean())

    def weighted(step: int) -> None:
        t, error = drawn()
        done((weight[t] * error.square().mean(1)).mean())

    def ours(step: int) -> None:
        done(diffusion_loss(network, x0, table, step=step, seed=0))

    return {"plain": plain, "weighted": weighted, "ours": ours}


def measure(rounds: int) -> dict[str, list[float]]:
    """Processor seconds of a step, one number a round."""
    each, found = loops(), dict[str, list[float]]()
    for number in range(-1, rounds):  # the first warms up
        for name in order_of(list(each), number):
            began = time.process_time()
            for step in range(BLOCK):
                each[name](step)
            if number >= 0:
                found.setdefault(name, []).append((time.process_time() - began) / BLOCK)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.studies.small_inputs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=Path, default=Path("small-inputs.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.rounds)
    told: dict[str, Any] = {"points": POINTS, "block": BLOCK, "rounds": options.rounds}
    for rival in ("plain", "weighted"):
        ratios = [ours / one for ours, one in zip(found["ours"], found[rival], strict=True)]
        told[f"ours_over_{rival}"] = statistics.quantiles(ratios, n=4)
    told |= {"seconds_per_step": found, "conditions": conditions(torch.device("cpu"))}
    write_json(options.out, told)
    for rival in ("plain", "weighted"):
        low, middle, high = told[f"ours_over_{rival}"]
        print(f"ours over {rival}: {middle:.2f} [{low:.2f}, {high:.2f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
