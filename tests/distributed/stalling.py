"""A data set for tests of waiting: the digits, and nothing at all while a file `hang-RANK` lies beside them."""

import os
import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from speed_engine.data import digits
from speed_engine.kinds import Section


class Config(Section):
    """Where the digits are."""

    kind: Literal["stalling"] = "stalling"
    path: str = Field(description="as of the kind digits")
    seconds: float = Field(0.0, description="what every read takes")


def build(config: Config) -> "Stalling":
    return Stalling(config)


class Stalling:
    def __init__(self, config: Config) -> None:
        self.inner = digits.build(digits.Config(path=config.path))
        self.facts, self.fingerprint = self.inner.facts, self.inner.fingerprint
        self.decode, self.seconds = self.inner.decode, config.seconds
        self.hang = Path(f"hang-{os.environ.get('RANK', '0')}").absolute()

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, indices, flips=None):
        time.sleep(self.seconds)
        while self.hang.exists():
            time.sleep(0.05)
        return self.inner.read(indices, flips)
