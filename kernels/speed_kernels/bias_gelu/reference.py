"""Bias and GELU in plain torch, in float64 throughout and rounded once at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TWICE_K = 2.0 * math.sqrt(2.0 / math.pi)
_C = 0.044715


def unavailable() -> str | None:
    """The reference runs everywhere."""
    return None


def bias_gelu(x: Tensor, bias_D: Tensor | None) -> Tensor:
    """See `speed_kernels.bias_gelu.op`."""
    u = _biased(x, bias_D)
    return (u * torch.sigmoid(_argument(u))).to(x.dtype).contiguous()


def bias_gelu_backward(d_y: Tensor, x: Tensor, bias_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """(d_x, d_bias); d_bias is empty without a bias."""
    u = _biased(x, bias_D)
    q = _argument(u)
    s, product = torch.sigmoid(q), torch.sigmoid(q) * torch.sigmoid(-q)
    bend = u * product * _TWICE_K * (1.0 + 3.0 * _C * u**2)
    # Where the product is zero the other factors may be infinite: theirs is zero.
    d_x = d_y.double() * (s + torch.where(product == 0.0, 0.0, bend))
    d_bias_D = d_x.unsqueeze(0).flatten(0, -2).sum(0) if bias_D is not None else d_x.new_empty(0)
    return d_x.to(x.dtype).contiguous(), d_bias_D.to(x.dtype)


def _biased(x: Tensor, bias_D: Tensor | None) -> Tensor:
    return x.double() if bias_D is None else x.double() + bias_D.double()


def _argument(u: Tensor) -> Tensor:
    return _TWICE_K * (u + _C * u**3)
