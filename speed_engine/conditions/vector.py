"""Condition `vector`: a short row of numbers a sample, from the array of the condition's name in the shards.

Augmentation labels, camera parameters, scores, an embedding made elsewhere. The network's keyword is the condition's
name -> float32 [B, K]; zeros mean "none", which the network has learned where `facts.null`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from speed_engine.conditions import dropped
from speed_engine.data import ConditionFacts
from speed_engine.kinds import Section


class Config(Section):
    """How often training forgets the vector."""

    kind: Literal["vector"] = "vector"
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of vectors replaced by zeros, for guidance"
    )


def build(config: Config, name: str, facts: ConditionFacts) -> Vector:
    """Raises ValueError where the set holds no floating-point vector under this name."""
    array = facts.arrays.get(name)
    if array is None or len(array.shape) != 1 or not array.dtype.startswith("float"):
        raise ValueError(f"conditions.{name} is a vector, but the data hold none under {name}")
    return Vector(name, replace(facts, null=config.dropout > 0), config.dropout)


class Vector:
    """See `speed_engine.conditions.Condition`."""

    def __init__(self, name: str, facts: ConditionFacts, dropout: float) -> None:
        self.name, self.facts, self.dropout = name, facts, dropout
        (self.width,) = facts.arrays[name].shape

    def drop(
        self, arrays: Mapping[str, Tensor], seed: int, step: int, first_slot: int
    ) -> dict[str, Tensor]:
        vector_BK = arrays[self.name].float()
        if self.dropout == 0:
            return {self.name: vector_BK}
        slot_B = np.arange(first_slot, first_slot + len(vector_BK))
        dropped_B = dropped(self.name, self.dropout, seed, step, slot_B)
        return {self.name: vector_BK * ~dropped_B[:, None]}

    def null(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        if not self.facts.null:
            raise ValueError(
                f"this network has no null {self.name}: it was trained with conditions.{self.name}.dropout=0"
            )
        return {self.name: torch.zeros(batch, self.width, device=device)}

    def asked(self, requests: Sequence[str]) -> dict[str, Tensor]:
        """Numbers with commas between them: 0.5,0,1"""
        return {self.name: torch.tensor([self._numbers(each) for each in requests])}

    def default(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        if self.facts.null:
            return self.null(len(numbers), "cpu")
        example = ",".join(["0"] * self.width)
        raise ValueError(
            f"this network must be told {self.name}; give --condition {self.name}={example}"
        )

    def _numbers(self, request: str) -> list[float]:
        try:
            numbers = [float(word) for word in request.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != self.width or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"{self.name} {request} is not {self.width} finite numbers with commas between them"
            )
        return numbers
