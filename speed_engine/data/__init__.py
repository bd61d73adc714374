"""Where training images come from: one file a kind of data (`data.kind: digits` is `digits.py`).

A file offers `Config` and `build(config) -> Source`. A source is a plain table of samples: it knows
neither order nor randomness. The loop decides the indices, the flips and the posterior's normals
(all of them addressed random numbers) and hands them in. The sub-folder `storage` holds the shard
format that the kinds share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor


class DataError(ValueError):
    """Something is wrong with the data; the text is one sentence with the place and the cure."""


class Source(Protocol):
    """A finite table of samples, safe to read from many threads.

    shape: (C, H, W) of a sample in model space. num_classes: 0 where the samples carry no labels.
    fingerprint: hexadecimal text that changes with any change of the data. num_stored: samples on
    disk (the source may be a part of them). can_flip: `flips` is accepted. has_posterior: mean and
    standard deviation are stored and `normals` is accepted.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def num_stored(self) -> int: ...
    @property
    def can_flip(self) -> bool: ...
    @property
    def has_posterior(self) -> bool: ...

    def __len__(self) -> int: ...

    def batch(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        flips: Sequence[bool] | np.ndarray | Tensor | None = None,
        normals: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x float32 [B, C, H, W] in model space, labels int64 [B]; zeros where there are no
        classes).

        indices: B integers in [0, len). flips: B booleans, true = mirrored left to right. normals:
        float32 [B, C, H, W], the draw from the posterior; without it the posterior's mean is
        returned. Raises DataError, naming the shard and the sample.
        """
        ...
