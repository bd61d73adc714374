"""The noise op in plain torch, in float64 throughout and rounded once at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speed_kernels import philox
from speed_kernels.table import A, B, column, epsilon


def unavailable() -> str | None:
    """The reference runs everywhere."""
    return None


def noise(
    x0: Tensor,
    cdf_T: Tensor | None,
    rows_T8: Tensor,
    time_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
    row_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.noise.op`."""
    if row_B is None:
        assert cdf_T is not None
        step, first_slot = address_2.unbind()
        slot_B = first_slot + torch.arange(x0.shape[0], device=x0.device)
        row_B = philox.row_draw(seed, step, slot_B, cdf_T, num_slots, stratified)
    else:
        row_B = row_B.clone()  # an op returns none of its arguments
    eps = epsilon(x0.shape, address_2, seed)
    a_B, b_B = (column(rows_T8, row_B, index, x0) for index in (A, B))
    x_t = a_B * x0.double() + b_B * eps
    return x_t.to(dtype).contiguous(), row_B, time_T.index_select(0, row_B)


def normals(address_2: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """See `speed_kernels.noise.op`."""
    return epsilon(shape, address_2, seed).float()
