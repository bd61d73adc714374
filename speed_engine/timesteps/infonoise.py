"""InfoNoise (Raya et al. 2026, arXiv 2602.18647): noise levels drawn by how fast information about
x0 arrives there.

By the I-MMSE identity the conditional entropy changes by mmse(sigma) / sigma^2 per unit of ln
sigma, which is exactly the plain eps loss. The running mean of that loss in bins of ln sigma, times
a gate sigma^n / (sigma^n + c^n) against the clean end, where the estimate is least to be trusted,
is the wanted allocation rho; the density is rho / w, w being the loss weight on x0, so that density
times weight follows rho (eqs. 13 to 16). The objective and its weight stay as they are.

n = 3 and the onset threshold 0.002 are the paper's; c = 0.15 is what it reports for CIFAR-10 (in
units of sigma with sigma_data 0.5; 0.2 for other modalities); `gate: null` finds c by its onset
rule, the largest sigma at which mmse / sigma^3 is still 0.002 of its maximum. Bins, smoothing,
warm-up (a fifth of a run is usual) and cadence are not in the paper; ours are below.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig
from speed_engine.timesteps.online import Columns, Observations, Online


class Config(MethodConfig):
    """`timesteps.kind: infonoise`."""

    kind: Literal["infonoise"] = "infonoise"
    num_bins: int = Field(64, ge=4, le=4096, description="bins of ln sigma")
    warmup_steps: int = Field(2000, ge=0, description="training steps with the initial density")
    every: int = Field(100, ge=1, description="training steps between two updates of the table")
    decay: float = Field(0.9, ge=0, lt=1, description="of the running mean, per update")
    gate_power: float = Field(3.0, gt=0, description="n of the gate")
    gate: float | None = Field(
        0.15, ge=0, description="c of the gate; 0 = no gate, null = onset rule"
    )
    onset: float = Field(0.002, gt=0, lt=1, description="threshold of the onset rule")
    sigma_data: float = Field(
        0.5, gt=0, description="standard deviation of x0 that c is stated for"
    )
    uniform_share: float = Field(
        0.01, ge=0, lt=1, description="of the uniform density mixed in, so that no bin starves"
    )


def build(config: Config, schedule: Schedule) -> Method:
    """Starts uniform in the training coordinate; combine it with another density to start there."""
    one = torch.ones_like(schedule.alpha)
    return Method(schedule.uniform, one, online=Information(config, schedule.sigma_data))


class Information(Online):
    """Running means of the eps loss and their weights in bins of ln sigma; float64 [bins]."""

    def __init__(self, config: Config, sigma_data: float) -> None:
        self.config, self.every, self.sigma_data = config, config.every, sigma_data

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        config = self.config
        # In the units in which the gate is stated: sigma / alpha scaled to sigma_data.
        level_T = (-columns.log_snr_T / 2).exp() * config.sigma_data
        log_T = level_T.log()
        known_T = torch.isfinite(log_T)
        low, high = log_T[known_T].min(), log_T[known_T].max()
        share_T = torch.where(known_T, (log_T - low) / (high - low), 1.0)
        self.bin_T = (share_T * config.num_bins).long().clamp(0, config.num_bins - 1)
        # Between the middles of two bins the rate is interpolated, in logarithms.
        place_T = (share_T * config.num_bins - 0.5).clamp(0, config.num_bins - 1)
        self.left_T = place_T.long().clamp(max=config.num_bins - 2)
        self.share_T = place_T - self.left_T
        edges = torch.linspace(0, 1, config.num_bins + 1, dtype=torch.float64, device=low.device)
        middles = (edges[1:] + edges[:-1]) / 2
        self.sigma_bins = (low + middles * (high - low)).exp()
        self.uniform_T = columns.measure_T / columns.measure_T.sum()
        # The rate is per ln sigma; a row's share of ln sigma turns it into the row's mass.
        (slope_T,) = torch.gradient(torch.where(known_T, log_T, high), edge_order=1)
        self.log_width_T = slope_T.clamp(min=0) * known_T
        self.to_eps_T = torch.where(known_T, (columns.eps_gain_T / columns.gain_T).square(), 0.0)
        weight_T = columns.total_weight_T * columns.gain_T.square()  # on x0
        self.inverse_weight_T = torch.where(weight_T > 0, 1 / weight_T, 0.0)
        zeros = torch.zeros(config.num_bins, dtype=torch.float64, device=low.device)
        self.mean, self.mass = zeros, zeros.clone()

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        config = self.config
        eps_loss_N = seen.mse_N * self.to_eps_T[seen.row_N]
        total, count = seen.sums(eps_loss_N, self.bin_T[seen.row_N], config.num_bins)
        # A mean weighted by counts, each update's weight fading by `decay`.
        self.mass.mul_(config.decay).add_(count)
        share = count / self.mass.clamp(min=1)
        self.mean.lerp_(total / count.clamp(min=1), share)
        if step < config.warmup_steps:
            return None, None
        rate = self._filled(self.mean) * self._gate()
        log_rate = rate.clamp_min(torch.finfo(torch.float64).tiny).log()
        rate_T = log_rate[self.left_T].lerp(log_rate[self.left_T + 1], self.share_T).exp()
        rho_T = rate_T * self.log_width_T
        density_T = rho_T * self.inverse_weight_T
        density_T = density_T / density_T.sum().clamp_min(torch.finfo(torch.float64).tiny)
        density_T = (1 - config.uniform_share) * density_T + config.uniform_share * self.uniform_T
        # Before the first loss there is nothing to follow.
        return torch.where(self.mass.sum() > 0, density_T, self.uniform_T), None

    def _filled(self, values: Tensor) -> Tensor:
        """Bins that nothing fell into take their nearest neighbour's value."""
        index = torch.arange(values.numel(), device=values.device)
        distance = (index[:, None] - index).abs() + 2 * values.numel() * (self.mass == 0)
        return values[distance.argmin(dim=1)]

    def _gate(self) -> Tensor:
        config, sigma = self.config, self.sigma_bins
        if config.gate is not None:
            middle = torch.full_like(sigma[:1], config.gate)
        else:
            per_sigma = self._filled(self.mean) / sigma
            above = per_sigma >= config.onset * per_sigma.max()
            middle = torch.where(above, sigma, sigma[:1]).max().expand(1)
        powered = sigma**config.gate_power
        return powered / (powered + middle**config.gate_power)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "mass": self.mass}
