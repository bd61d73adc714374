"""A set in two parts: samples that training reads, and samples that it never reads.

Which is which is decided by a keyed permutation of the set alone, not by the run's seed, so that runs of different
seeds and methods are judged on the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from speed_engine.data import DataError, Facts, Source, order

SPLIT_SEED = 2**63 - 1  # no run's own: those end at 2^62


def split(source: Source, count: int) -> tuple[Part, Part]:
    """(what training reads, `count` held-out samples). Raises DataError where too little would be left to train on."""
    size = len(source)
    if not 0 < count <= size // 2:
        raise DataError(
            f"validation.samples={count} of the {size} samples of the data cannot be held out; at most half can "
            "(validation.every=0 holds none out)"
        )
    held = np.sort(order.permuted(np.arange(count), size, SPLIT_SEED, 0))
    return Part(source, held, inverted=True), Part(source, held, inverted=False)


class Part:
    """A source that is a part of another: those of its samples that `held` lists, or all others (`inverted`).

    held: int64, rising. Offers what `speed_engine.data.Source` does.
    """

    def __init__(self, source: Source, held: np.ndarray, inverted: bool) -> None:
        self.source, self.held, self.inverted = source, held, inverted
        # The k-th sample that is not held has as many held ones before it as there are j with held[j] - j <= k.
        self.gaps = held - np.arange(len(held))

    @property
    def facts(self) -> Facts:
        return self.source.facts

    @property
    def fingerprint(self) -> str:
        """That of the whole set for the part that training reads: which part it is stands in the configuration."""
        if self.inverted:
            return self.source.fingerprint
        told = self.source.fingerprint.encode() + self.held.astype("<i8").tobytes()
        return hashlib.sha256(told).hexdigest()

    @property
    def remarks(self) -> Sequence[str]:
        return getattr(self.source, "remarks", ())

    def __len__(self) -> int:
        return len(self.source) - len(self.held) if self.inverted else len(self.held)

    def whole(self, indices: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        """The numbers of these samples in the whole set; int64."""
        number = np.asarray(indices, dtype=np.int64)
        if self.inverted:
            return number + np.searchsorted(self.gaps, number, side="right")
        return self.held[number]

    def read(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        flips: Sequence[bool] | np.ndarray | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.source.read(self.whole(indices), flips)

    def decode(self, stored: Tensor, normals: Tensor | None = None, **dtype: Any) -> Tensor:
        return self.source.decode(stored, normals, **dtype)
