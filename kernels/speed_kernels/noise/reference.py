"""The noise op in plain torch, in float64 throughout and rounded once at the end."""

from __future__ import annotations

import torch
from speed_kernels import philox
from torch import Tensor


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
    eps = epsilon(x0, address_2, seed)
    a_B, b_B = (column(rows_T8, row_B, index, x0) for index in (0, 1))
    x_t = a_B * x0.double() + b_B * eps
    return x_t.to(dtype).contiguous(), row_B, tau_T[row_B]


def epsilon(x0: Tensor, address_2: Tensor, seed: int) -> Tensor:
    """The noise of a batch, float64, of x0's shape."""
    step, first_slot = address_2.unbind()
    slot_B = first_slot + torch.arange(x0.shape[0], device=x0.device)
    num_elements = x0[:1].numel() if x0.shape[0] else 0
    return philox.normals(seed, step, slot_B, philox.STREAM_EPS, num_elements).view(x0.shape)


def column(rows_T8: Tensor, row_B: Tensor, index: int, x0: Tensor) -> Tensor:
    """A column of every sample's row, float64, shaped to multiply x0."""
    return rows_T8[:, index].double()[row_B].view(-1, *[1] * (x0.dim() - 1))
