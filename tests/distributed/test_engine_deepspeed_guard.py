"""`engine: deepspeed`: clipping and refusal of gradients that are not finite, over two processes, whoever does them.

In ZeRO 1 and 2 adamw_ema does both, in ZeRO 0 and 3 DeepSpeed does. Run as a script, this file is one of the
processes: arguments are a folder and the cases (stage,precision,clip).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speed_engine.distributed import Processes, start, stop
from speed_engine.engines import optimizer
from speed_engine.engines.deepspeed import Config, DeepSpeedEngine
from speed_engine.engines.torch import Config as TorchConfig
from speed_engine.engines.torch import TorchEngine

WORLD, BATCH, STEPS, POISONED = 2, 8, 6, 3
CLIP = 0.1  # below the norm of every step's gradient
PRECISIONS = ("fp32", "bf16")
CASES = [
    f"{stage},{precision},{clip}"
    for precision in PRECISIONS
    for stage in (0, 1, 2, 3)
    for clip in (0.0, CLIP)
]
ONE = Processes(0, 1, 0, torch.device("cpu"))


class Timeless(nn.Sequential):
    """Layers in a row, which are told the time and do not mind it."""

    def forward(self, input: Tensor, time_B: Tensor | None = None) -> Tensor:
        return super().forward(input)


def network() -> Timeless:
    """Weights that bf16 can hold, so that masters made before and after rounding are the same."""
    torch.manual_seed(1)
    model = Timeless(nn.Linear(13, 29), nn.SiLU(), nn.Linear(29, 7), nn.SiLU(), nn.Linear(7, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def clipped(clip: float) -> optimizer.Config:
    """A large eps makes the update proportional to the gradient: a wrong factor shows."""
    return optimizer.Config(lr=0.02, eps=0.1, clip=clip, ema_decay=0.5)


def train(engine: Any, rank: int, world: int) -> dict[str, Any]:
    """`STEPS` updates and, at `POISONED`, one more whose gradient is not finite on the last process alone."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(BATCH, 13, generator=generator).chunk(world)[rank].to(engine.compute_dtype)
        y = torch.randn(BATCH, 5, generator=generator).chunk(world)[rank]
        for poison in (True, False) if step == POISONED else (False,):
            loss = (engine.forward(x, x[:, 0]).float() - y).square().mean()
            engine.backward(loss * float("nan") if poison and rank == world - 1 else loss)
            engine.step(0.02)
    weights, ema = engine.weights(ema=False), engine.weights(ema=True)
    facts = engine.facts().get("deepspeed_config", {})
    return {"weights": weights, "ema": ema, "skipped": engine.num_skipped(), "settings": facts}


def process(folder: Path, cases: list[str]) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    processes = start("cpu")
    found = {}
    for case in cases:
        stage, precision, clip = case.split(",")
        config = Config(zero=int(stage), precision=precision)  # pyright: ignore[reportArgumentType]
        sizes: dict[str, Any] = {
            "micro_batch": BATCH // WORLD,
            "accumulation": 1,
            "backend": "auto",
        }
        parts = (config, network(), clipped(float(clip)), processes)
        found[case] = train(DeepSpeedEngine(*parts, **sizes), processes.rank, processes.world)
    torch.save(found, folder / f"{processes.rank}.pt")
    stop(together=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_ranks) -> list[dict[str, Any]]:
    """Per process: case -> what `train` found."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(__file__, folder, WORLD, CASES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def expected(precision: str, clip: float) -> dict[str, Any]:
    """One process without DeepSpeed that sees the whole batch."""
    config = TorchConfig(precision=precision)  # pyright: ignore[reportArgumentType]
    sizes: dict[str, Any] = {"micro_batch": BATCH, "accumulation": 1, "backend": "auto"}
    return train(TorchEngine(config, network(), clipped(clip), ONE, **sizes), 0, 1)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(one[name] - other[name]).flatten() for name in one]).norm())


@pytest.mark.parametrize("case", CASES)
def test_the_same_updates_as_one_process(results, case):
    stage, precision, clip = case.split(",")
    wanted, found = expected(precision, float(clip)), results[0][case]
    start = {name: value.detach() for name, value in network().named_parameters()}
    for which in ("weights", "ema"):
        moved = distance(wanted[which], start)
        gap = distance(found[which], wanted[which])
        assert gap < (1e-5 if precision == "fp32" else 2e-2) * moved, (which, gap, moved)
    assert [each[case]["skipped"] for each in results] == [1, 1] and wanted["skipped"] == 1
    by_us = int(stage) in (1, 2)
    assert found["settings"]["zero_optimization"].get("compute_grad_norm", True) != by_us
    assert found["settings"]["gradient_clipping"] == (0.0 if by_us else float(clip))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_clipping_is_felt(precision):
    """Or the test above could not fail."""
    free, clipped = expected(precision, 0.0), expected(precision, CLIP)
    start = {name: value.detach() for name, value in network().named_parameters()}
    assert distance(clipped["weights"], start) < 0.7 * distance(free["weights"], start)


def test_deepspeed_guards_where_it_has_to():
    """Offload needs DeepSpeed's norm, and other optimizers have no guard of their own."""
    from speed_engine.engines.deepspeed import _guard_ourselves

    def settings(stage: int, **more: Any) -> dict[str, Any]:
        return {"zero_optimization": {"stage": stage, **more}, "bf16": {"enabled": True}}

    assert _guard_ourselves(settings(1), optimizer.Config())
    assert _guard_ourselves(settings(2), optimizer.Config(clip=1.0))
    assert not _guard_ourselves(settings(3), optimizer.Config())
    assert not _guard_ourselves(settings(0), optimizer.Config())
    assert not _guard_ourselves(settings(1), optimizer.Config(name="torch_fused"))
    offloaded = settings(2, offload_optimizer={"device": "cpu"})
    assert not _guard_ourselves(offloaded, optimizer.Config())
    assert "compute_grad_norm" not in offloaded["zero_optimization"]


if __name__ == "__main__":
    process(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # as train.py does, and for its reason
