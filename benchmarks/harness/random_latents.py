"""`data: benchmarks.harness.random_latents`: latents of ImageNet's shape that need no files, to compare arithmetic on.

Smooth random fields, one pattern a class plus one a sample, scaled to variance one. They are not images: a network
finds something to learn in them, and the curves say nothing of how images would come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from speed_engine.conditions.label import described
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.kinds import Section

KIND = "benchmarks.harness.random_latents"


class Config(Section):
    """Random latents [channels, size, size]."""

    kind: Literal["benchmarks.harness.random_latents"] = KIND
    num_samples: int = Field(default=8192, ge=1, description="kept in memory, float16")
    num_classes: int = Field(default=1000, ge=0, description="0: no labels")
    channels: int = Field(default=4, ge=1)
    size: int = Field(default=32, ge=8, description="height and width, a multiple of 8")
    seed: int = Field(default=0, ge=0)


class RandomLatents:
    """See `speed_engine.data.Source`."""

    def __init__(self, config: Config) -> None:
        num, channels, size = config.num_samples, config.channels, config.size
        generator = torch.Generator().manual_seed(config.seed)
        patterns = torch.randn(max(1, config.num_classes), channels, 8, 8, generator=generator)
        label = torch.randint(max(1, config.num_classes), (num,), generator=generator)
        self.labels = label
        self.samples = torch.empty(num, channels, size, size, dtype=torch.float16)
        for begin in range(0, num, 1024):
            part = label[begin : begin + 1024]
            coarse = patterns[part]
            coarse = coarse + torch.randn(coarse.shape, generator=generator)
            field = F.interpolate(coarse, (size, size), mode="bilinear")
            field = field + 0.3 * torch.randn(field.shape, generator=generator)
            self.samples[begin : begin + 1024] = (field / field.std()).half()
        space = Space("latents", (1.0,) * channels, (0.0,) * channels)
        told = {"label": described(config.num_classes)} if config.num_classes else {}
        self.facts = Facts((channels, size, size), space, told, flips=True)
        self.fingerprint = f"random latents {config.model_dump_json()}"

    def __len__(self) -> int:
        return len(self.samples)

    def read(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        flips: Sequence[bool] | np.ndarray | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(stored [B, C, H, W] in float16, labels int64 [B])."""
        chosen = torch.as_tensor(indices)
        stored = self.samples[chosen]
        if flips is not None:
            rows = torch.as_tensor(flips)
            stored[rows] = stored[rows].flip(-1)
        return stored, {"label": self.labels[chosen]} if self.facts.conditions else {}

    def decode(self, stored: Tensor, normals: Tensor | None = None) -> Tensor:
        """Model space, float32, on the device of `stored`."""
        assert normals is None  # there is no posterior
        return stored.float()


def build(config: Config) -> RandomLatents:
    """The source. Raises ValueError for a size that eight does not divide."""
    if config.size % 8:
        raise ValueError(f"data.size {config.size} must be a multiple of 8")
    return RandomLatents(config)
