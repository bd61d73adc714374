"""ANT-UW (Go et al. 2023): uncertainty weighting of clusters of steps as tasks of one multi-task
problem.

L = sum over clusters c of (exp(-s_c) L_c + s_c) / 2 with one learned number s_c per cluster, so a
step of cluster c weighs exp(-s_c) / 2. Defaults: 5 clusters of equal length (each gets a fifth of
the batch: uniform steps), learning rate 0.025 of s. s is trained by Adam on the observed mean
losses of the clusters, which is its exact gradient.

The authors' script differs in two places, which `official: true` follows: L_c is divided by the number
of clusters (so exp(s_c) settles at a fifth of the cluster's loss), and it is the squared error plus the
variational term, unscaled, both weighed (`weight_vb`), not the squared error alone. The default is the
paper's sum over tasks: with a learned variance the variational term trains the variance alone and
should not move the weight of the means. As a part of `combine`, `official` needs weight_vb: false in the
part and weight_vb: true beside the parts, where it is read.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig
from speed_engine.timesteps.online import Columns, Observations, Online, bins
from speed_engine.timesteps.online.adam import Adam


class Config(MethodConfig):
    """`timesteps.kind: ant_uw`."""

    kind: Literal["ant_uw"] = "ant_uw"
    num_clusters: int = Field(5, ge=1, description="tasks the steps are divided into")
    lr: float = Field(0.025, gt=0, description="learning rate of the log variances s")
    every: int = Field(1, ge=1, description="training steps between two updates of s")
    official: bool = Field(
        False, description="as the authors' script: mean of mse + vb over clusters, both weighed"
    )

    @model_validator(mode="before")
    @classmethod
    def _official_weighs_both(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("official") and "weight_vb" not in value:
            return {**value, "weight_vb": True}
        return value


def build(config: Config, schedule: Schedule) -> Method:
    """Starts with s = 0: weight 1/2. Raises ValueError with more clusters than rows."""
    if config.num_clusters > schedule.num_rows:
        raise ValueError(
            f"timesteps.num_clusters={config.num_clusters} is above the schedule's "
            f"{schedule.num_rows} steps; choose fewer"
        )
    half = torch.full_like(schedule.alpha, 0.5)
    return Method(schedule.uniform, half, online=Uncertainty(config))


class Uncertainty(Online):
    """The log variances of the clusters; float64 [clusters]."""

    def __init__(self, config: Config) -> None:
        self.config, self.every = config, config.every

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        device = columns.density_T.device
        self.cluster_T = bins(columns.density_T.numel(), self.config.num_clusters, device)
        zeros = torch.zeros(self.config.num_clusters, dtype=torch.float64, device=device)
        self.adam = Adam(zeros, self.config.lr)

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        cluster_N = self.cluster_T[seen.row_N]
        num, loss_N = self.config.num_clusters, seen.mse_N
        if self.config.official:
            loss_N = (loss_N + seen.vb_N) / num
        total, count = seen.sums(loss_N, cluster_N, num)
        mean = total / count.clamp(min=1)
        grad = (1 - (-self.adam.value).exp() * mean) / 2
        self.adam.step(torch.where(count > 0, grad, 0.0))
        return None, (-self.adam.value[self.cluster_T]).exp() / 2

    def tensors(self) -> dict[str, Tensor]:
        return self.adam.tensors()
