"""Our training step for the benchmark: the loop's own `DiffusionStep` on an engine, built from a `RunConfig`.

`overrides` says what `ours` is, and is the one place to change when the engine learns something new. For experiments
the environment adds to it: BENCH_OURS_TORCH="engine.compile=true" (or _DEEPSPEED), dotted overrides as on the command
line of the trainer; the report shows them.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.harness import random_latents
from benchmarks.harness.measure import GateError, Unavailable
from benchmarks.report.predictions import NUM_CLASSES
from benchmarks.train_step.problem import DECAY, LR, SEED, Problem, TrainCase, seed_weights
from benchmarks.train_step.providers import Trainer
from speed_engine import config as configuration
from speed_engine.config import RunConfig
from speed_engine.data import Batch
from speed_engine.distributed import Processes
from speed_engine.models.dit import DiT, position_embedding
from speed_engine.training import assembly
from speed_engine.training.step import DiffusionStep

PRESET = "imagenet256_dit_xl2"
AHEAD = 1024  # addresses on the device before they are needed, as the loop's reading thread does


def overrides(kind: str, case: TrainCase, device: torch.device) -> list[str]:
    """The configuration of `ours-<kind>`, over the preset: bf16, uniform time steps, the rivals' numbers."""
    found = [
        f"seed={SEED}",
        f"model.size={case.size}",
        "timesteps=uniform",
        f"train.global_batch={case.batch}",
        "train.stratified=false",
        "train.flip=false",
        "validation.every=0",  # the batch is all the data there are
        f"optim.lr={LR}",
        f"optim.ema_decay={DECAY}",
        f"engine={kind}",
        f"engine.device={device.type}",
        "engine.precision=bf16",
    ]
    if kind == "deepspeed":
        found.append("engine.zero=1")
    return found + experiment(kind)


def experiment(kind: str) -> list[str]:
    """Overrides of the environment."""
    return os.environ.get(f"BENCH_OURS_{kind.upper()}", "").split()


def open_step(
    config: RunConfig, problem: Problem, processes: Processes
) -> tuple[DiffusionStep, Any, dict[str, str]]:
    """(the step, the network, op -> backend), as `loop.train` builds them, from the seeded weights."""
    case, device = problem.case, processes.device
    choices = assembly.choose_kernels(config, device)
    fallbacks = [f"{choice.op}: {choice.reason}" for choice in choices if choice.fallback]
    if fallbacks:
        raise Unavailable("; ".join(fallbacks))
    backends = {choice.op: choice.backend for choice in choices}
    source = random_latents.build(
        random_latents.Config(
            num_samples=case.batch, size=case.sample_size, num_classes=NUM_CLASSES
        )
    )
    told, _, facts = assembly.told(config, source.facts)
    model = cast("DiT", assembly.build_model(told, facts, "meta", backends))
    model.to_empty(device=device)
    seed_weights(model.named_parameters())
    with torch.no_grad():  # the only buffer
        width, tokens = model.pos_embed.shape[2], model.pos_embed.shape[1]
        model.pos_embed.copy_(position_embedding(width, math.isqrt(tokens)))
    parts = assembly.build(config, processes, source, model)
    do = assembly.open_step(parts, assembly.open_engine(parts))
    if getattr(config.engine, "cuda_graph", False):
        do = do.captured()
    return do, model, backends


class OurLoop:
    """`DiffusionStep` with a batch that is always the same, at an address that moves on."""

    def __init__(self, do: DiffusionStep, problem: Problem, processes: Processes) -> None:
        self.do, self.problem, self.processes = do, problem, processes
        self.done = 0
        self.batches = self._batches()

    def _batches(self) -> Iterator[Batch]:
        for first in itertools.count(0, AHEAD):
            steps_N = torch.arange(first, first + AHEAD)
            address_N2 = torch.stack([steps_N, torch.zeros_like(steps_N)], dim=1)
            for address_2 in address_N2.to(self.problem.device).unbind():
                yield Batch(self.problem.x0, {"label": self.problem.labels_B}, address_2)

    def step(self) -> None:
        self.do(self.done, self.batches)
        self.done += 1

    def gate_step(self, index: int) -> float:
        assert index == self.done, "the gate comes first, and in order"
        self.step()
        return float(self.do.meter.read(self.processes)["loss"])

    def learned(self, names: Sequence[str], ema: bool) -> dict[str, Tensor]:
        weights = self.do.engine.weights(ema=ema) or {}
        return {name: weights[name] for name in names}

    def check(self) -> None:
        """A step that was skipped would have been cheap."""
        skipped = self.do.engine.num_skipped()
        loss = float(self.do.meter.read(self.processes)["loss"])
        if skipped or not math.isfinite(loss):
            raise GateError(f"{skipped} steps were skipped, the mean loss is {loss}")


def ours(kind: str, problem: Problem, processes: Processes) -> Trainer:
    """`ours-torch` or `ours-deepspeed`. Raises Unavailable where a kernel or a package is missing."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = configuration.load(PRESET, overrides(kind, problem.case, problem.device))
    try:
        do, model, backends = open_step(config, problem, processes)
    except ImportError as error:
        raise Unavailable(f"{kind}: {error}") from error
    ours = OurLoop(do, problem, processes)
    facts = {
        "dtype": "bfloat16",
        "backend": ", ".join(sorted(set(backends.values()))),
        "engine": do.engine.facts()["engine"],
        "distribution": do.engine.facts()["distribution"],
    }
    if experiment(kind):
        facts["overrides"] = " ".join(experiment(kind))
    return Trainer(
        ours.step,
        ours.gate_step,
        ours.learned,
        ours.check,
        optimizer=do.engine.optimizer,
        state_bytes=lambda: state_bytes(model, do.engine.optimizer),
        facts=facts,
        close=lambda: _close(do.engine),
    )


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Memory of weights, masters and optimizer state, each storage once."""
    tensors = [*model.parameters()]
    tensors += [param for group in optimizer.param_groups for param in group["params"]]
    for state in optimizer.state.values():
        tensors += [each for each in state.values() if isinstance(each, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _close(engine: Any) -> None:
    inner = getattr(engine, "engine", None)  # DeepSpeed's own, whose hooks keep everything alive
    if inner is not None:
        inner.destroy()
