"""EDM2's uncertainty weighting (Karras et al. 2024, eq. 21): loss = lambda(sigma) / exp(u(sigma)) *
error + u(sigma).

u is a linear function of 128 random Fourier features of ln(sigma) / 4, learned with the network; at
its optimum every noise level contributes a loss of one. lambda is EDM's 1 / c_out^2 on the error of
x0 (1 on the F-target). The density is log-normal with p_mean = -0.4, p_std = 1.0 (EDM2's 512-pixel
latents; -0.8 and 1.6 for 64 pixels), matched by SNR. u's gradient needs the per-sample errors only,
so it is trained beside the network on the observed losses, by Adam. EDM2 constrains u's weights to
unit length and trains them with the network's own optimizer; here they are free and have their own
learning rate.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig
from speed_engine.timesteps.edm import denoiser_weight
from speed_engine.timesteps.log_normal import level_density
from speed_engine.timesteps.online import Columns, Observations, Online
from speed_engine.timesteps.online.adam import Adam


class Config(MethodConfig):
    """`timesteps.kind: edm2_uncertainty`."""

    kind: Literal["edm2_uncertainty"] = "edm2_uncertainty"
    p_mean: float = Field(-0.4, description="mean of ln sigma")
    p_std: float = Field(1.0, gt=0, description="standard deviation of ln sigma")
    sigma_data: float = Field(0.5, gt=0, description="sd that p_mean was stated for")
    num_features: int = Field(128, ge=1, description="Fourier features of u")
    lr: float = Field(0.01, gt=0, description="learning rate of u")
    every: int = Field(1, ge=1, description="training steps between two updates of u")


def build(config: Config, schedule: Schedule) -> Method:
    """Starts with u = 0: EDM's weight."""
    density = level_density(schedule, config.p_mean, config.p_std, config.sigma_data)
    return Method(density, denoiser_weight(schedule), "x0", online=LogVariance(config))


class LogVariance(Online):
    """The coefficients of u; float64 [features + 1], the last one constant."""

    def __init__(self, config: Config) -> None:
        self.config, self.every = config, config.every

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        device, num = columns.density_T.device, self.config.num_features
        noise_T = (-columns.log_snr_T / 2 + math.log(self.config.sigma_data)) / 4
        noise_T = noise_T.nan_to_num(posinf=float(noise_T[noise_T.isfinite()].max()))
        generator = torch.Generator().manual_seed(0)  # the same features on every rank
        frequency = torch.randn(num, generator=generator, dtype=torch.float64).to(device)
        phase = torch.rand(num, generator=generator, dtype=torch.float64).to(device)
        angle = 2 * math.pi * (noise_T[:, None] * frequency + phase)
        constant = torch.ones_like(noise_T)[:, None]
        self.features_TP = torch.cat([angle.cos() * math.sqrt(2 / num), constant], dim=1)
        self.lambda_T = columns.weight_T
        self.adam = Adam(torch.zeros(num + 1, dtype=torch.float64, device=device), self.config.lr)

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        num_rows = self.lambda_T.numel()
        total_T, count_T = seen.sums(seen.mse_N, seen.row_N, num_rows)
        u_T = self.features_TP @ self.adam.value
        # d/du of mean(lambda / exp(u) * error + u), summed over the samples of a row first.
        slope_T = count_T - self.lambda_T * (-u_T).exp() * total_T
        self.adam.step(self.features_TP.T @ slope_T / count_T.sum().clamp(min=1))
        return None, self.lambda_T * (-(self.features_TP @ self.adam.value)).exp()

    def tensors(self) -> dict[str, Tensor]:
        return self.adam.tensors()
