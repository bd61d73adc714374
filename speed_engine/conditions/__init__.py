"""What a network is told beside x_t and the time: one file a condition (`conditions.label` is `label.py`).

A file offers a `Config` (with `kind` and `dropout`) and `build(config, name, facts) -> Condition`. What a
sample's condition is lies in named arrays beside x in the shards (`data.ConditionFacts`). The loader
lets the condition drop it now and then, at an address; the network gets the tensors by keyword, in
training, in probing and in sampling alike.

A file may also offer `made(config, name, facts: data.Facts) -> ConditionFacts`: its condition is in no data, but made
from each sample once a configuration names it (`augment`, see `Augmenting`). A network's keywords for a condition are
its name, or begin with it and `_` (`text`, `text_tokens`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from speed_kernels import philox
from torch import Tensor

from speed_engine import kinds
from speed_engine.data import ConditionFacts


class Condition(Protocol):
    """One condition of one run. `facts.null` says whether "none" has a meaning to the network."""

    @property
    def facts(self) -> ConditionFacts:
        """What the data hold for it, with `null` as this run has it."""
        ...

    def drop(
        self, arrays: Mapping[str, Tensor], seed: int, step: int, first_slot: int
    ) -> dict[str, Tensor]:
        """The network's keywords [B, ...] from the stored arrays [B, ...], some replaced by "none".

        On the host. Which ones is a function of (seed, step, first_slot + place in the batch) alone.
        """
        ...

    def null(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """The keywords for "none". Raises ValueError where the network never learned it."""
        ...

    def asked(self, requests: Sequence[str]) -> dict[str, Tensor]:
        """The keywords for what a person asks of `sample`, one text a sample (a class's number or
        name, a prompt, a file). Raises ValueError naming the request."""
        ...

    def default(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The keywords of the samples with these numbers when nothing is asked for (classes in
        turn, say). Raises ValueError where there is no sensible one."""
        ...


@runtime_checkable
class Augmenting(Condition, Protocol):
    """A condition that changes the samples themselves in training, and tells the network how.

    Its "none", nothing was changed, is what validation and samples are told; guidance does not lead away from it.
    """

    def augment(
        self, x0: Tensor, seed: int, step: int, first_slot: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(x0 [B, C, *space] changed, in model space on its device; the keywords there).

        A function of x0 and (seed, step, first_slot + place in the batch) alone. What it draws may lie on the host,
        where nothing waits for the device.
        """
        ...


@runtime_checkable
class Mirroring(Condition, Protocol):
    """A condition whose arrays have a left and a right, and are mirrored with their samples."""

    def mirrored(self, arrays: Mapping[str, Tensor], flips_B: Tensor) -> Mapping[str, Tensor]:
        """The stored arrays [B, ...] of samples of which some are mirrored (bool [B]), on the host, before `drop`.

        Raises ValueError where those of the mirrored samples are not there.
        """
        ...


@runtime_checkable
class Noising(Condition, Protocol):
    """A condition that training blurs by noise, so that the network bears with worse ones; validation does not."""

    def noised(
        self, told: Mapping[str, Tensor], seed: int, step: int, first_slot: int
    ) -> dict[str, Tensor]:
        """`drop`'s keywords, on the training device, with their noise.

        A function of them and (seed, step, first_slot + place in the batch) alone.
        """
        ...


@runtime_checkable
class Encoding(Condition, Protocol):
    """A condition whose keywords a network of its own makes of what is stored, where the data hold no more."""

    network: Any

    def load(self, device: torch.device | str) -> None:
        """Load the network, where it is needed, before the first `drop`. Raises ValueError where it cannot be."""
        ...


def dropped(name: str, share: float, seed: int, step: int, slot_B: np.ndarray) -> Tensor:
    """Which samples of the global slots a condition of this name is kept from, bool [B], on the host.

    Two conditions of one set are dropped independently of each other.
    """
    block = zlib.crc32(name.encode()) & 0x7FFFFFFF
    word_B = philox.first_words(seed, step, slot_B, philox.STREAM_CONDITION_DROP, block)
    return torch.from_numpy(word_B < share * 2**32)


def undropped(name: str, condition: Condition) -> Condition:
    """The same condition, which the network is always told."""
    facts = condition.facts
    module = kinds.find("conditions", facts.kind)
    known = module.Config.model_fields
    config = module.Config(**({"dropout": 0} if "dropout" in known else {}))
    built: Condition = module.build(config, name, facts)
    if isinstance(condition, Encoding) and isinstance(built, Encoding):
        built.network = condition.network
    return built
