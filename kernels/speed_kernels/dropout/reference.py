"""Addressed dropout in plain torch, on any device; the host reads nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from speed_kernels import philox
from speed_kernels.dropout.op import threshold


def unavailable() -> str | None:
    """The reference runs everywhere."""
    return None


def words(address_3: Tensor, batch: int, num: int, layer: int) -> Tensor:
    """The random words of the first `num` elements of every sample: int64 [B, num]."""
    seed, step, slot = address_3.unbind()
    device = address_3.device
    shape = (batch, -(-num // 4))
    counter = (
        torch.arange(shape[1], device=device).expand(shape),
        (slot + torch.arange(batch, device=device))[:, None].expand(shape),
        step.expand(shape),
        torch.full(shape, philox.STREAM_DROPOUT + 256 * layer, device=device),
    )
    bits_BK4 = philox.philox4x32(torch.stack(counter, dim=-1), (seed & 0xFFFFFFFF, seed >> 32))
    return bits_BK4.flatten(1)[:, :num]


def dropout(x_BCHW: Tensor, address_3: Tensor, layer: int, p: float) -> Tensor:
    """See `speed_kernels.dropout.op`; x is in channels-last memory and not empty."""
    batch, channels, height, width = x_BCHW.shape
    word_BN = words(address_3, batch, x_BCHW[0].numel(), layer)
    word_BCHW = word_BN.view(batch, height, width, channels).permute(0, 3, 1, 2)
    # One product in float32, as the other backends make it.
    wide = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
    y_BCHW = torch.where(word_BCHW >= threshold(p), wide * (1.0 / (1.0 - p)), 0.0).to(x_BCHW.dtype)
    return torch.empty_like(y_BCHW, memory_format=torch.channels_last).copy_(y_BCHW)
