"""From latents to the mean loss, through a network, as public trainers write it: learned variance, epsilon, restated.

Shape legend: B samples, C channels, T time steps, X the shape [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ops.diffusion_step.formulas import LN2, HostTables, binned_nll

Network = Callable[[Tensor, Tensor, Any], Tensor]  # (x_t, t_B, labels_B) -> [B, 2C, H, W]


class ReferenceLoss:
    """Tables in float64 on the host, one blocking upload a use; every sample pays for likelihood and divergence."""

    def __init__(self, tables: HostTables) -> None:
        self.tables = tables

    def __call__(
        self, network: Network, x0: Tensor, labels_B: Tensor | None, t_B: Tensor, eps: Tensor
    ) -> Tensor:
        """The batch's mean loss, float32 []. t_B int64 on the device, eps like x0."""
        tables = self.tables
        x_t = self._at(tables.sqrt_alpha_bar, t_B, x0) * x0
        x_t = x_t + self._at(tables.sqrt_one_minus_alpha_bar, t_B, x0) * eps
        prediction, v = torch.split(network(x_t, t_B, labels_B), x0.shape[1], dim=1)
        frozen = torch.cat([prediction.detach(), v], dim=1)
        vb_B = self._variational(frozen, x0, x_t, t_B)
        # A table of all possible targets is built, then one is taken.
        targets = {"previous": self._posterior(x0, x_t, t_B)[0], "x0": x0, "eps": eps}
        mse_B = _mean_flat((targets["eps"] - prediction) ** 2)
        return (mse_B + vb_B).mean()

    def _variational(self, values: Tensor, x0: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        true_mean, _, true_log_variance = self._posterior(x0, x_t, t_B)
        mean, log_variance = self._model_posterior(values, x_t, t_B)
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        nll_B = _mean_flat(binned_nll(x0 - mean, log_variance, x0)) / LN2
        return torch.where(t_B == 0, nll_B, _mean_flat(kl) / LN2)

    def _posterior(self, x0: Tensor, x_t: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, variance, log variance) of q(x_{t-1} | x_t, x0)."""
        mean = self._at(self.tables.posterior_mean_x0, t_B, x_t) * x0
        mean = mean + self._at(self.tables.posterior_mean_x_t, t_B, x_t) * x_t
        variance = self._at(self.tables.posterior_variance, t_B, x_t)
        return mean, variance, self._at(self.tables.posterior_log_variance, t_B, x_t)

    def _model_posterior(self, values: Tensor, x_t: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) as the network has them."""
        prediction, v = torch.split(values, x_t.shape[1], dim=1)
        low = self._at(self.tables.posterior_log_variance, t_B, x_t)
        high = self._at(self.tables.log_betas, t_B, x_t)
        fraction = (v + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        torch.exp(log_variance)  # trainers return the variance as well
        clean = self._at(self.tables.x0_from_x_t, t_B, x_t) * x_t
        clean = clean - self._at(self.tables.x0_from_eps, t_B, x_t) * prediction
        return self._posterior(clean, x_t, t_B)[0], log_variance

    @staticmethod
    def _at(table: np.ndarray, t_B: Tensor, like: Tensor) -> Tensor:
        """The table's entries at t_B, expanded to the shape of `like`."""
        values_B = torch.from_numpy(table).to(device=t_B.device)[t_B].float()
        return values_B.view(-1, *[1] * (like.dim() - 1)) + torch.zeros(
            like.shape, device=t_B.device
        )


def _mean_flat(values: Tensor) -> Tensor:
    return values.mean(dim=list(range(1, values.dim())))
