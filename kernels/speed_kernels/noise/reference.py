"""The noise op in plain torch, in float64 throughout and rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from speed_kernels import philox
from speed_kernels.table import A, B, column, epsilon


def unavailable() -> str | None:
    """The reference runs everywhere."""
    return None


def noise(
    x0: Tensor,
    cdf_T: Tensor,
    rows_T8: Tensor,
    tau_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.noise.op`."""
    step, first_slot = address_2.unbind()
    slot_B = first_slot + torch.arange(x0.shape[0], device=x0.device)
    row_B = philox.row_draw(seed, step, slot_B, cdf_T, num_slots, stratified)
    eps = epsilon(x0.shape, address_2, seed)
    a_B, b_B = (column(rows_T8, row_B, index, x0) for index in (A, B))
    x_t = a_B * x0.double() + b_B * eps
    return x_t.to(dtype).contiguous(), row_B, tau_T[row_B]
