"""From latents to the mean loss, through a network, in good plain torch; `reference_loss` is the public trainers'.

The same mathematics as `diffusion_providers` (learned variance, linear schedule, epsilon), with a network in the middle
instead of a fixed output. Time steps and noise are given, so that all providers can be held against one draw.

Shape legend: B samples, C channels, T time steps, X the shape [B, C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops.diffusion_step.providers import closed_forms, likelihood_bits, mixed, upload
from benchmarks.ops.diffusion_step.reference_loss import Network


@dataclass(frozen=True)
class Draw:
    """t_B int64 on the device, eps like x0; first_K: indices of the samples at t = 0, on the host."""

    t_B: Tensor
    eps: Tensor
    first_K: Tensor

    def part(self, start: int, end: int) -> Draw:
        """The draw of samples start .. end - 1."""
        inside = (self.first_K >= start) & (self.first_K < end)
        return Draw(self.t_B[start:end], self.eps[start:end], self.first_K[inside] - start)


def eager_loss(
    network: Network, x0: Tensor, labels_B: Tensor, draw: Draw, rows_T8: Tensor
) -> Tensor:
    """Tables on the device, gathered once; closed forms; the likelihood of the samples at t = 0 alone."""
    rows_BC = rows_T8[draw.t_B]
    x_t = mixed(x0, draw.eps, rows_BC, x0.dtype)
    out = network(x_t, draw.t_B, labels_B)
    mse_B, vb_B, error, v = closed_forms(out, x0, draw.eps, rows_BC)
    if len(draw.first_K):
        at = upload(draw.first_K, x0.device)
        nll_K = likelihood_bits(error[at], v[at], x0[at], rows_BC[at])
        vb_B = vb_B.index_copy(0, at, nll_K)
    return (mse_B + vb_B).mean()


def masked_loss(
    network: Network, x0: Tensor, labels_B: Tensor, t_B: Tensor, eps: Tensor, rows_T8: Tensor
) -> Tensor:
    """The same without a decision on the host, so that one compiled graph serves every batch."""
    rows_BC = rows_T8[t_B]
    out = network(mixed(x0, eps, rows_BC, x0.dtype), t_B, labels_B)
    mse_B, vb_B, error, v = closed_forms(out, x0, eps, rows_BC)
    vb_B = torch.where(t_B == 0, likelihood_bits(error, v, x0, rows_BC), vb_B)
    return (mse_B + vb_B).mean()
