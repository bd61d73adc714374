"""Importance sampling by the loss's second moment (Nichol and Dhariwal 2021, eq. 18): p_t ~
sqrt(E[L_t^2]).

E is over the last `history` = 10 losses at t, mixed with 0.001 uniform; uniform until every t has
its 10. The weight 1 / (T p_t) keeps the objective what it was (`corrected: false` leaves it out). L
is the unweighted MSE, plus the variational term in bits if there is one. Tables of more than 1024
rows share a history among neighbours.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig
from speed_engine.timesteps.online import Columns, Observations, Online, bins

MAX_BINS = 1024


class Config(MethodConfig):
    """`timesteps.kind: loss_second_moment`."""

    kind: Literal["loss_second_moment"] = "loss_second_moment"
    history: int = Field(10, ge=1, le=1000, description="losses kept for every step")
    uniform_share: float = Field(0.001, gt=0, le=1, description="of the uniform density mixed in")
    corrected: bool = Field(True, description="weigh by 1/(T p), so that only the variance changes")
    every: int = Field(10, ge=1, description="training steps between two updates of the table")


def build(config: Config, schedule: Schedule) -> Method:
    """Starts uniform with weight one."""
    one = torch.ones_like(schedule.alpha)
    return Method(schedule.uniform, one, online=SecondMoment(config))


class SecondMoment(Online):
    """Rings of the last losses of every bin of rows; float64 [bins, history]."""

    def __init__(self, config: Config) -> None:
        self.config, self.every = config, config.every

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        num_rows = columns.density_T.numel()
        device = columns.density_T.device
        num_bins = min(num_rows, MAX_BINS)
        self.uniform_T = columns.measure_T / columns.measure_T.sum()
        self.bin_T = bins(num_rows, num_bins, device)
        self.ring = torch.zeros(num_bins, self.config.history, dtype=torch.float64, device=device)
        self.count = torch.zeros(num_bins, dtype=torch.int64, device=device)

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        self._remember(seen)
        moment_T = self.ring.square().mean(dim=1).sqrt()[self.bin_T]
        learned_T = moment_T * self.uniform_T
        learned_T = learned_T / learned_T.sum().clamp_min(torch.finfo(torch.float64).tiny)
        share = self.config.uniform_share
        mixed_T = (1 - share) * learned_T + share * self.uniform_T
        density_T = torch.where((self.count >= self.config.history).all(), mixed_T, self.uniform_T)
        density_T = density_T / density_T.sum()
        return density_T, self.uniform_T / density_T if self.config.corrected else None

    def _remember(self, seen: Observations) -> None:
        """Append the observations, in order, to their bins' rings, without a loop over them."""
        num_bins, history = self.ring.shape
        # Unseen ones go to a bin of their own behind the others.
        bin_N = torch.where(seen.seen_N, self.bin_T[seen.row_N], num_bins)
        order_N = torch.argsort(bin_N, stable=True)
        sorted_N = bin_N[order_N]
        new = torch.zeros(num_bins + 1, dtype=torch.int64, device=bin_N.device)
        new.index_add_(0, bin_N, torch.ones_like(bin_N))
        first = new.cumsum(0) - new
        rank_N = torch.arange(bin_N.numel(), device=bin_N.device) - first[sorted_N]
        # Only the last `history` of a bin survive, so no place is written twice.
        keep_N = (rank_N >= new[sorted_N] - history) & (sorted_N < num_bins)
        count = torch.cat([self.count, self.count[:1]])
        place_N = sorted_N * history + (count[sorted_N] + rank_N) % history
        place_N = torch.where(keep_N, place_N, num_bins * history)
        flat = torch.cat([self.ring.flatten(), self.ring.new_zeros(1)])
        flat.scatter_(0, place_N, (seen.mse_N + seen.vb_N)[order_N])
        self.ring.copy_(flat[:-1].view(num_bins, history))
        self.count += new[:-1]

    def tensors(self) -> dict[str, Tensor]:
        return {"ring": self.ring, "count": self.count}
