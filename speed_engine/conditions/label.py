"""Condition `label`: one of a set's classes, or none.

The network's keyword is the condition's name -> int64 [B]: a class from 0 to num_values - 1, or num_values for "none",
which exists where `facts.null`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from speed_kernels import philox
from torch import Tensor

from speed_engine.data import ArrayFacts, ConditionFacts
from speed_engine.kinds import Section


class Config(Section):
    """How often training forgets the class, for classifier-free guidance (arXiv 2207.12598)."""

    kind: Literal["label"] = "label"
    dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of labels dropped, for guidance; 0: no null label",
    )


def described(
    num_classes: int, names: Sequence[str] = (), *, null: bool = False, name: str = "label"
) -> ConditionFacts:
    """What a set says of its classes."""
    arrays = {name: ArrayFacts((), "int64")}
    return ConditionFacts("label", arrays, num_classes, tuple(names), null)


def build(config: Config, name: str, facts: ConditionFacts) -> Label:
    """Raises ValueError where the set holds no classes under this name."""
    if list(facts.arrays) != [name] or facts.arrays[name].shape != () or facts.num_values < 1:
        raise ValueError(f"conditions.{name} is a label, but the data hold no class under {name}")
    return Label(name, replace(facts, null=config.dropout > 0), config.dropout)


class Label:
    """See `speed_engine.conditions.Condition`."""

    def __init__(self, name: str, facts: ConditionFacts, dropout: float) -> None:
        self.name, self.facts, self.dropout = name, facts, dropout

    def drop(
        self, arrays: Mapping[str, Tensor], seed: int, step: int, first_slot: int
    ) -> dict[str, Tensor]:
        label_B = arrays[self.name].long()
        if self.dropout == 0:
            return {self.name: label_B}
        slot_B = np.arange(first_slot, first_slot + len(label_B))
        word_B = philox.first_words(seed, step, slot_B, philox.STREAM_LABEL_DROP)
        dropped_B = torch.from_numpy((word_B + 0.5) * 2.0**-32 < self.dropout)
        return {self.name: label_B.masked_fill(dropped_B, self.facts.num_values)}

    def null(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        if not self.facts.null:
            raise ValueError(
                f"this network has no null {self.name}: it was trained with conditions.{self.name}.dropout=0"
            )
        number = self.facts.num_values
        return {self.name: torch.full((batch,), number, dtype=torch.int64, device=device)}

    def asked(self, requests: Sequence[str]) -> dict[str, Tensor]:
        return {self.name: torch.tensor([self._number(each) for each in requests])}

    def default(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The classes in turn."""
        number_B = torch.tensor(list(numbers), dtype=torch.int64)
        return {self.name: number_B % self.facts.num_values}

    def _number(self, request: str) -> int:
        """A class by its name, or by its number."""
        if request in self.facts.names:
            return self.facts.names.index(request)
        last = self.facts.num_values - 1
        if not request.isascii() or not request.isdigit() or int(request) > last:
            names = f", or one of the names {', '.join(self.facts.names[:10])}"
            raise ValueError(
                f"{self.name} {request} is not a class; give a number from 0 to {last}"
                f"{names if self.facts.names else ''}"
            )
        return int(request)
