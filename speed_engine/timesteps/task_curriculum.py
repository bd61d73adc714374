"""Denoising task difficulty curriculum (Kim et al. 2024, arXiv 2403.10348): noisy steps first,
cleaner ones as the loss stalls.

The steps are divided into N clusters of equal length. Training starts on the noisiest; when the
running mean of the loss has not improved for `patience` training steps the next cleaner cluster is
added, until all are in. Steps within the added clusters are uniform. N = 20, patience = 200 and the
smoothing are third-party constants; the paper's could not be confirmed.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig
from speed_engine.timesteps.online import Columns, Observations, Online


class Config(MethodConfig):
    """`timesteps.kind: task_curriculum`."""

    kind: Literal["task_curriculum"] = "task_curriculum"
    num_clusters: int = Field(20, ge=1, description="N; clusters are added from the noisy end")
    patience: int = Field(200, ge=1, description="training steps without improvement")
    smoothing: float = Field(
        0.99, ge=0, lt=1, description="decay of the mean loss per training step"
    )
    tolerance: float = Field(1e-4, ge=0, description="what counts as an improvement")
    every: int = Field(10, ge=1, description="training steps between two looks at the loss")


def build(config: Config, schedule: Schedule) -> Method:
    """Starts with the noisiest cluster. Raises ValueError with more clusters than rows."""
    if config.num_clusters > schedule.num_rows:
        raise ValueError(
            f"timesteps.num_clusters={config.num_clusters} is above the schedule's "
            f"{schedule.num_rows} steps; choose fewer"
        )
    cluster = torch.arange(schedule.num_rows) * config.num_clusters // schedule.num_rows
    age = config.num_clusters - 1 - cluster  # 0 for the noisiest, which is in from the start
    density = schedule.uniform * (age == 0)
    one = torch.ones_like(schedule.alpha)
    return Method(density / density.sum(), one, online=Curriculum(config, age))


class Curriculum(Online):
    """Device scalars: how many clusters were added, the mean loss, its best, and the steps since."""

    def __init__(self, config: Config, age: Tensor) -> None:
        self.config, self.every, self.age_T = config, config.every, age

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        device = columns.density_T.device
        self.age_T = self.age_T.to(device)
        self.uniform_T = columns.measure_T / columns.measure_T.sum()
        self.added = torch.zeros((), dtype=torch.int64, device=device)
        self.waited = torch.zeros((), dtype=torch.int64, device=device)
        self.mean = torch.full((), math.nan, dtype=torch.float64, device=device)
        self.best = torch.full((), math.inf, dtype=torch.float64, device=device)

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        config = self.config
        total, count = seen.sums(seen.mse_N, torch.zeros_like(seen.row_N), 1)
        loss = (total / count.clamp(min=1))[0]
        keep = config.smoothing**seen.num_steps
        mean = torch.where(self.mean.isnan(), loss, keep * self.mean + (1 - keep) * loss)
        self.mean.copy_(torch.where(count[0] > 0, mean, self.mean))
        improved = self.mean < self.best - config.tolerance
        self.best.copy_(torch.where(improved, self.mean, self.best))
        self.waited.copy_(torch.where(improved, 0, self.waited + seen.num_steps))
        stalled = (self.waited >= config.patience) & (self.added < config.num_clusters - 1)
        self.added += stalled
        # A new cluster is a new problem: its mean and best start afresh.
        self.waited.masked_fill_(stalled, 0)
        self.mean.masked_fill_(stalled, math.nan)
        self.best.masked_fill_(stalled, math.inf)
        return self.uniform_T * (self.age_T <= self.added), None

    def tensors(self) -> dict[str, Tensor]:
        return {"added": self.added, "waited": self.waited, "mean": self.mean, "best": self.best}
