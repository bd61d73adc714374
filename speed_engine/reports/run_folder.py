"""A run folder seen from outside: its configuration, and its network with the averaged weights."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speed_engine.conditions import Condition
from speed_engine.config import RunConfig, build
from speed_engine.data import Facts
from speed_engine.progress import for_reader
from speed_engine.step_table import StepTable
from speed_engine.training import checkpoint
from speed_engine.training.assembly import build_table, told
from speed_engine.training.manifest import upgraded
from speed_engine.training.saving import METHOD_STATE
from speed_engine.weights import file as weights_file


@dataclass(frozen=True)
class Run:
    """The newest good checkpoint of a run folder."""

    folder: Path
    config: RunConfig
    facts: Facts  # what the network was told of the data
    conditions: dict[str, Condition]
    manifest: dict[str, Any]
    step: int
    checkpoint: Path
    trusted: Collection[str] = ()  # modules from outside that its files may name

    def model(self, weights: str = "ema") -> nn.Module:
        """The network with the weights `ema` or `model`, on the host, in evaluation mode."""
        network, _ = weights_file.load(
            self.checkpoint / f"{weights}.safetensors", trusted=self.trusted
        )
        return network.eval()

    def table(self) -> StepTable:
        """The step table that the run began with."""
        return build_table(self.config)

    def learned_table(self) -> StepTable | None:
        """The step table as a method that changes while training runs left it; None for a method that does not."""
        table = self.table()
        if not table.changes:
            return None
        table.start(self.config.train.global_batch, self.facts.shape)
        state = self.checkpoint / METHOD_STATE
        told = weights_file.read_safetensors(state)[0] if state.exists() else {}
        table.load_state_dict(told, self.step)
        return table


def open_run(folder: Path, trusted: Collection[str] = ()) -> Run:
    """The run in `folder`. Raises CheckpointError where there is none that can be used.

    trusted: the outside modules that may be imported. A run's manifest can come from anybody, so a
    `kind` in it that is a dotted path is refused (with the cure) unless it is here.
    """
    if not folder.is_dir():
        raise checkpoint.CheckpointError(f"there is no run folder {folder}; check --run")
    found = checkpoint.newest(
        folder, lambda text: print(for_reader(f"WARNING: {text}", sys.stderr), file=sys.stderr)
    )
    if found is None:
        raise checkpoint.CheckpointError(
            f"{folder} holds no checkpoint; train first, or check --run"
        )
    try:
        manifest = upgraded(found.manifest, found.folder)
        config = build(manifest["config"], trusted)
        # A condition that was left out (null) is not among the facts that the network was told.
        kept = {name: each for name, each in config.conditions.items() if each is not None}
        used = config.model_copy(update={"conditions": kept})
        _, conditions, facts = told(used, Facts.from_json(manifest["data"]))
    except ValueError as error:
        raise checkpoint.CheckpointError(f"the run {folder}: {error}") from error
    return Run(folder, config, facts, conditions, manifest, found.step, found.folder, trusted)


def device_of(name: str) -> torch.device:
    """auto, cpu or cuda as a device. Raises ValueError if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
