"""The networks: one file an architecture; the word `model.kind` of a configuration is the file's name.

A file offers

    Config                  its settings
    TAKES                   names of the conditions it can be told, e.g. ("label",); all are optional
    KERNELS                 ops of speed_kernels that `build` can use (may be left out)
    COMPUTE_KEYS            keys of Config that say how to compute, not what is learned (may be left out)
    build(config, facts, num_outputs, *, seed, device, dtype, backends) -> Model
    macs_per_sample(config, facts, num_outputs) -> int      multiply-adds of one forward pass of one sample
    training_macs_per_sample(...) -> int    of all forward passes of a training step (may be left out: one)

facts: `data.Facts`, holding exactly the conditions that the network will be told. num_outputs: channels of
the output (C, or 2C with a learned variance). seed: of the initial weights, equal on every device. dtype: of the
products. backends: op -> backend for the ops of KERNELS; None: plain torch. A network knows nothing of noise or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor

from speed_engine.data import Facts

# passes(seed, address int64 [2]) -> (share of the loss, further keywords of the network), one entry a forward pass
Passes = Callable[[int, Tensor], Sequence[tuple[float, dict[str, Tensor]]]]


class Model(Protocol):
    """A torch.nn.Module with these attributes, which are `build`'s arguments. It is called by

        forward(x [B, C, *space], time float32 [B], **conditions) -> [B, num_outputs, *space]

    A module may also offer `passes(seed, address) -> [(share, further keywords), ...]`: the forward
    passes that one batch is put through and each one's share of the loss; without it there is one.
    One that would compute otherwise among several processes, to rounding, has the attribute `same_anywhere`,
    False; where it is set to True (`train.exact_sums`) it must not.
    """

    config: Any  # the file's own Config
    facts: Facts
    num_outputs: int

    def __call__(self, x: Tensor, time_B: Tensor, **conditions: Tensor) -> Tensor: ...


class ModelFile(Protocol):
    """What a file of this folder offers, as the rest of the engine calls it."""

    Config: type[BaseModel]
    TAKES: tuple[str, ...]

    def build(
        self,
        config: Any,
        facts: Facts,
        num_outputs: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        backends: Mapping[str, str] | None = None,
    ) -> Any: ...

    def macs_per_sample(self, config: Any, facts: Facts, num_outputs: int) -> int: ...


def refuse_unknown_conditions(module: ModuleType | ModelFile, facts: Facts, where: str) -> None:
    """Refuse data with a condition that the model does not take. Raises ValueError, naming both."""
    unknown = [name for name in facts.conditions if name not in module.TAKES]
    if unknown:
        taken = ", ".join(module.TAKES) or "none"
        raise ValueError(
            f"the run has the condition {unknown[0]!r}, which model.kind={where} does not take (it takes: "
            f"{taken}); leave it out with conditions.{unknown[0]}=null, or choose another model"
        )
