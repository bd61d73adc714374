"""The diffusion step's mathematics for the benchmarks: the linear schedule's tables, and the loss in float64.

`truth` follows J. Ho et al. 2020 and A. Nichol and P. Dhariwal 2021 through the posterior means and autograd, and knows
nothing of our closed forms; every provider is held against it. `rows_T8` holds our closed forms, as the step table of
schedule linear, objective epsilon, uniform time steps does.

Shape legend: B samples, C channels, T time steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LN2 = math.log(2.0)


@dataclass(frozen=True)
class HostTables:
    """The columns that trainers keep as float64 NumPy arrays on the host, [T] each."""

    log_betas: np.ndarray
    sqrt_alpha_bar: np.ndarray
    sqrt_one_minus_alpha_bar: np.ndarray
    x0_from_x_t: np.ndarray
    x0_from_eps: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: np.ndarray  # row 0 takes row 1's
    posterior_mean_x0: np.ndarray
    posterior_mean_x_t: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.log_betas)


def host_tables(num_rows: int = 1000) -> HostTables:
    """DDPM's linear schedule, betas 1e-4 .. 0.02 for a thousand steps."""
    betas = np.linspace(1e-4, 0.02, num_rows, dtype=np.float64) * (1000 / num_rows)
    alpha_bar = np.cumprod(1.0 - betas)
    previous = np.append(1.0, alpha_bar[:-1])
    variance = betas * (1.0 - previous) / (1.0 - alpha_bar)
    return HostTables(
        log_betas=np.log(betas),
        sqrt_alpha_bar=np.sqrt(alpha_bar),
        sqrt_one_minus_alpha_bar=np.sqrt(1.0 - alpha_bar),
        x0_from_x_t=np.sqrt(1.0 / alpha_bar),
        x0_from_eps=np.sqrt(1.0 / alpha_bar - 1.0),
        posterior_variance=variance,
        posterior_log_variance=np.log(np.append(variance[1], variance[1:])),
        posterior_mean_x0=betas * np.sqrt(previous) / (1.0 - alpha_bar),
        posterior_mean_x_t=(1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar),
    )


def packed_rows(tables: HostTables) -> Tensor:
    """float32 [T, 8]: A, B, C, D, W, LOGVAR_MIN, LOGVAR_MAX, MEAN_GAP of the same recipe, for our ops."""
    ones, zeros = np.ones(tables.num_rows), np.zeros(tables.num_rows)
    ratio = tables.sqrt_one_minus_alpha_bar / tables.sqrt_alpha_bar
    columns = [
        tables.sqrt_alpha_bar,
        tables.sqrt_one_minus_alpha_bar,
        zeros,
        ones,
        ones,
        tables.posterior_log_variance,
        tables.log_betas,
        tables.posterior_mean_x0 * ratio,
    ]
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def uniform_cdf(num_rows: int) -> Tensor:
    """int64 [T]: the uniform density's cumulative sum times 2**32."""
    ends = torch.arange(1, num_rows + 1, dtype=torch.float64) / num_rows
    return (ends * 2**32).round().long()


def binned_nll(centered: Tensor, log_variance: Tensor, x0: Tensor) -> Tensor:
    """-ln of the mass of N(x0 - centered, exp(log_variance)) in x0's bin of width 2/255; nats, elementwise.

    Tanh approximation of the distribution function, probabilities clamped at 1e-12, outermost bins open.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    cdf_upper = _approximate_cdf(inverse_std * (centered + 1.0 / 255.0))
    cdf_lower = _approximate_cdf(inverse_std * (centered - 1.0 / 255.0))
    log_mass = torch.where(
        x0 < -0.999,
        torch.log(cdf_upper.clamp(min=1e-12)),
        torch.where(
            x0 > 0.999,
            torch.log((1.0 - cdf_lower).clamp(min=1e-12)),
            torch.log((cdf_upper - cdf_lower).clamp(min=1e-12)),
        ),
    )
    return -log_mass


def _approximate_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def truth(
    tables: HostTables, x0: Tensor, out: Tensor, t_B: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """(losses float64 [B], gradients float64 like out): per sample, of its own loss and not of the batch's mean."""

    def column(table: np.ndarray) -> Tensor:
        return torch.from_numpy(table).to(x0.device)[t_B].view(-1, *[1] * (x0.dim() - 1))

    out = out.detach().double().requires_grad_()
    x0, eps = x0.double(), eps.double()
    prediction, v = out.chunk(2, dim=1)
    x_t = column(tables.sqrt_alpha_bar) * x0 + column(tables.sqrt_one_minus_alpha_bar) * eps
    mse_B = (prediction - eps).square().flatten(1).mean(1)

    fraction = (v + 1.0) / 2.0
    log_min, log_max = column(tables.posterior_log_variance), column(tables.log_betas)
    log_variance = fraction * log_max + (1.0 - fraction) * log_min
    predicted_x0 = (
        column(tables.x0_from_x_t) * x_t - column(tables.x0_from_eps) * prediction.detach()
    )
    to_x0, to_x_t = column(tables.posterior_mean_x0), column(tables.posterior_mean_x_t)
    mean, true_mean = to_x0 * predicted_x0 + to_x_t * x_t, to_x0 * x0 + to_x_t * x_t
    kl = 0.5 * (
        -1.0
        + log_variance
        - log_min
        + torch.exp(log_min - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    nll = binned_nll(x0 - mean, log_variance, x0)
    first = (t_B == 0).view(-1, *[1] * (x0.dim() - 1))
    vb_B = torch.where(first, nll, kl).flatten(1).mean(1) / LN2
    losses_B = mse_B + vb_B
    (gradient,) = torch.autograd.grad(losses_B.sum(), out)
    return losses_B.detach(), gradient
