"""The loss op in plain torch, in float64 throughout and rounded once at the end.

The gradients are written out (an op's implementation runs below autograd); the tests compare them with autograd's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speed_kernels.table import NUM_COLUMNS, column, epsilon

_LN2 = math.log(2.0)


def unavailable() -> str | None:
    """The reference runs everywhere."""
    return None


def loss(
    out: Tensor,
    x0: Tensor,
    row_B: Tensor,
    rows_T8: Tensor,
    address_2: Tensor,
    seed: int,
    learned_variance: bool,
    vb_scale: float,
    weight_vb: bool,
    grad_scale: float,
    ticket: Tensor | None,  # the Triton kernel's
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.loss.op`."""
    f, v = (out.double().chunk(2, dim=1)) if learned_variance else (out.double(), None)
    eps, x0 = epsilon(x0.shape, address_2, seed), x0.double()
    columns = (column(rows_T8, row_B, index, x0) for index in range(NUM_COLUMNS))
    _, _, c_B, d_B, w_B, min_B, max_B, gap_B = columns
    num_elements = max(x0[:1].numel(), 1)

    error = f - (c_B * x0 + d_B * eps)
    mse_B = (error**2).flatten(1).mean(1) if x0.dim() > 1 else error**2
    grad = 2.0 * w_B * error / num_elements
    vb_B = torch.zeros_like(mse_B)
    vb_weight_B = vb_scale * (w_B if weight_vb else torch.ones_like(w_B))
    if v is not None:
        log_var = (v + 1.0) / 2.0 * (max_B - min_B) + min_B
        nats, slope = divergence(gap_B * error, log_var, min_B)
        nats_0, slope_0 = likelihood(x0, gap_B * error, log_var)
        first = (row_B == 0).view(-1, *[1] * (x0.dim() - 1))
        vb_B = torch.where(first, nats_0, nats).flatten(1).mean(1) / _LN2
        slope = torch.where(first, slope_0, slope)
        grad_v = vb_weight_B * slope / _LN2 / num_elements * (max_B - min_B) / 2.0
        grad = torch.cat((grad, grad_v), dim=1)
    total_B = w_B.flatten() * mse_B + vb_weight_B.flatten() * vb_B
    losses_3B = torch.stack((total_B, mse_B, vb_B)).float()
    return (grad_scale * total_B.sum()).float(), losses_3B, (grad_scale * grad).to(out.dtype)


def divergence(gap: Tensor, log_var: Tensor, true_log_var: Tensor) -> tuple[Tensor, Tensor]:
    """KL(N(mean + gap, exp(true_log_var)) || N(mean, exp(log_var))) in nats, and its slope by log_var."""
    ratio = torch.exp(true_log_var - log_var) + gap**2 * torch.exp(-log_var)
    return 0.5 * (-1.0 + log_var - true_log_var + ratio), 0.5 * (1.0 - ratio)


def likelihood(x0: Tensor, centered: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    """-ln of the mass that N(x0 - centered, exp(log_var)) puts into x0's bin of width 2/255, and its slope by log_var.

    The outermost bins (|x0| > 0.999) reach to infinity.
    """
    inverse_std = torch.exp(-0.5 * log_var)
    upper, lower = inverse_std * (centered + 1.0 / 255.0), inverse_std * (centered - 1.0 / 255.0)
    cdf_upper, density_upper = approximate_normal(upper)
    cdf_lower, density_lower = approximate_normal(lower)
    left, right = x0 < -0.999, x0 > 0.999
    mass = torch.where(left, cdf_upper, torch.where(right, 1.0 - cdf_lower, cdf_upper - cdf_lower))
    # The standardised bounds shrink by half of themselves per unit of log variance.
    d_upper, d_lower = -0.5 * upper * density_upper, -0.5 * lower * density_lower
    d_mass = torch.where(left, d_upper, torch.where(right, -d_lower, d_upper - d_lower))
    clamped = mass.clamp(min=1e-12)
    return -torch.log(clamped), torch.where(mass < 1e-12, 0.0, -d_mass / clamped)


def approximate_normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tanh approximation of the standard normal distribution function, and its derivative."""
    scale = math.sqrt(2.0 / math.pi)
    tanh = torch.tanh(scale * (x + 0.044715 * x**3))
    slope = scale * (1.0 + 3 * 0.044715 * x**2)
    # Where 1 - tanh^2 is zero the slope may be infinite: their product is zero.
    density = torch.where(tanh.abs() == 1.0, 0.0, 0.5 * (1.0 - tanh**2) * slope)
    return 0.5 * (1.0 + tanh), density
