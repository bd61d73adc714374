"""A data set for tests of faults: the digits, some of them not finite, and none while a file `hang-RANK` is there."""

import os
import time
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from speed_engine.data import digits
from speed_engine.kinds import Section


class Config(Section):
    """Where the digits are."""

    kind: Literal["stalling"] = "stalling"
    path: str = Field(description="as of the kind digits")
    seconds: float = Field(0.0, description="what every read takes")
    poisoned: list[int] = Field([], description="samples that are not finite")
    unreadable: list[int] = Field([], description="samples that cannot be read")


def build(config: Config) -> "Stalling":
    return Stalling(config)


class Stalling:
    def __init__(self, config: Config) -> None:
        self.inner = digits.build(digits.Config(path=config.path))
        self.facts, self.fingerprint = self.inner.facts, self.inner.fingerprint
        self.seconds = config.seconds
        self.poisoned = torch.tensor(config.poisoned, dtype=torch.int64)
        self.unreadable = set(config.unreadable)
        self.hang = Path(f"hang-{os.environ.get('RANK', '0')}").absolute()

    def __len__(self) -> int:
        return len(self.inner)

    def decode(self, stored, normals=None):
        return stored

    def read(self, indices, flips=None):
        time.sleep(self.seconds)
        while self.hang.exists():
            time.sleep(0.05)
        if found := self.unreadable.intersection(indices.tolist()):
            raise ValueError(f"sample {min(found)} cannot be read")
        stored, arrays = self.inner.read(indices, flips)
        x = self.inner.decode(stored)
        x[torch.isin(torch.as_tensor(indices), self.poisoned)] = float("nan")
        return x, arrays
