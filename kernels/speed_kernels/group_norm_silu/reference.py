"""Group normalisation with SiLU in plain torch, in float64 throughout and rounded once at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable() -> str | None:
    """The reference runs everywhere."""
    return None


def group_norm_silu(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """See `speed_kernels.group_norm_silu.op`."""
    x_BGN = x_BCHW.double().reshape(x_BCHW.shape[0], num_groups, -1)
    mean_BG = x_BGN.mean(2)
    variance_BG = ((x_BGN - mean_BG[..., None]) ** 2).mean(2)
    statistics_B2G = torch.stack((mean_BG, torch.rsqrt(variance_BG + eps)), 1)
    statistics_B2C = statistics_B2G.repeat_interleave(x_BCHW.shape[1] // num_groups, 2)
    x_hat_BCHW = _normalised(x_BCHW, statistics_B2C)
    z_BCHW = x_hat_BCHW * _column(weight_C) + _column(bias_C)
    y_BCHW = z_BCHW * torch.sigmoid(z_BCHW) if silu else z_BCHW
    dtype = torch.float64 if x_BCHW.dtype == torch.float64 else torch.float32
    return _finished(y_BCHW, x_BCHW.dtype), statistics_B2C.to(dtype)


def group_norm_silu_backward(
    d_y_BCHW: Tensor,
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_B2C: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, d_weight, d_bias); see `speed_kernels.group_norm_silu.op`."""
    x_hat_BCHW = _normalised(x_BCHW, statistics_B2C.double())
    d_z_BCHW = d_y_BCHW.double()
    if silu:
        z_BCHW = x_hat_BCHW * _column(weight_C) + _column(bias_C)
        s_BCHW = torch.sigmoid(z_BCHW)
        d_z_BCHW = d_z_BCHW * (s_BCHW + z_BCHW * s_BCHW * torch.sigmoid(-z_BCHW))
    d_weight_C = (d_z_BCHW * x_hat_BCHW).sum((0, 2, 3))
    d_bias_C = d_z_BCHW.sum((0, 2, 3))
    weighted_BCHW = d_z_BCHW * _column(weight_C)
    first_BCHW = _group_mean(weighted_BCHW, num_groups)
    second_BCHW = _group_mean(weighted_BCHW * x_hat_BCHW, num_groups)
    rstd_BC11 = statistics_B2C[:, 1, :, None, None].double()
    d_x_BCHW = rstd_BC11 * (weighted_BCHW - first_BCHW - x_hat_BCHW * second_BCHW)
    return (
        _finished(d_x_BCHW, x_BCHW.dtype),
        d_weight_C.to(weight_C.dtype),
        d_bias_C.to(bias_C.dtype),
    )


def _normalised(x_BCHW: Tensor, statistics_B2C: Tensor) -> Tensor:
    mean_BC11, rstd_BC11 = statistics_B2C[..., None, None].unbind(1)
    return (x_BCHW.double() - mean_BC11) * rstd_BC11


def _group_mean(value_BCHW: Tensor, num_groups: int) -> Tensor:
    """Every element's mean over its group."""
    value_BGN = value_BCHW.reshape(value_BCHW.shape[0], num_groups, -1)
    return value_BGN.mean(2, keepdim=True).expand_as(value_BGN).reshape(value_BCHW.shape)


def _column(value_C: Tensor) -> Tensor:
    return value_C.double()[:, None, None]


def _finished(value_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded, with the strides of channels-last memory even where a size of one leaves the choice."""
    result = torch.empty_like(value_BCHW, dtype=dtype, memory_format=torch.channels_last)
    return result.copy_(value_BCHW)
