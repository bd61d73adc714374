"""Small DiTs with random weights, and what it means that two of them are equal."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speed_engine.conditions import label
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import dit

SMALL = dit.Config(size="tiny/2", hidden_size=16, depth=2, num_heads=2)


def small_facts(channels: int = 1, size: int = 8, num_classes: int = 10, null: bool = True):
    told = {"label": label.described(num_classes, null=null)} if num_classes else {}
    return Facts((channels, size, size), Space.pixels(channels), told)


def randomised(
    config: dit.Config = SMALL, seed: int = 1, learned_variance: bool = True, **changes: Any
) -> dit.DiT:
    """A DiT all of whose weights are random; changes: of `small_facts`."""
    facts = small_facts(**changes)
    model = dit.build(config, facts, facts.shape[0] * (1 + learned_variance), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.fixture(scope="session")
def network() -> Callable[..., dit.DiT]:
    return randomised


@pytest.fixture(scope="session")
def facts() -> Callable[..., Facts]:
    return small_facts


@pytest.fixture(scope="session")
def equal() -> Callable[[torch.nn.Module, torch.nn.Module], bool]:
    """Whether two networks have the same tensors, bit by bit."""

    def compare(a: torch.nn.Module, b: torch.nn.Module) -> bool:
        first, second = a.state_dict(), b.state_dict()
        return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)

    return compare


@pytest.fixture(scope="session")
def bomb() -> type[Bomb]:
    return Bomb
