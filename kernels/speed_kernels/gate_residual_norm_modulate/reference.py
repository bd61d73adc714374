"""The op in plain torch, in float64 throughout; results are rounded once, the residual sum before its statistics.

Shape legend: B samples, T tokens, D channels.
"""

from __future__ import annotations

from torch import Tensor

from speed_kernels.e4m3 import Scaled, quantise


def unavailable() -> str | None:
    """The reference runs everywhere."""
    return None


def forward(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    rows: Scaled | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(sum_BTD, y_BTD, mean_BT float32, rstd_BT float32), as in op.py; without a branch there is no sum.

    rows: fresh tensors, [B, T, D] e4m3 and [B, T, 1] float32, to be filled with the rounded y's rows."""
    sum_BTD = None
    if branch_BTD is not None and gate_BD is not None:
        sum_BTD = x_BTD.double() + gate_BD.double()[:, None] * biased(branch_BTD, bias_D)
        sum_BTD = sum_BTD.to(x_BTD.dtype).contiguous()
    stream_BTD = (x_BTD if sum_BTD is None else sum_BTD).double()
    mean_BT1 = stream_BTD.mean(2, keepdim=True)
    centred_BTD = stream_BTD - mean_BT1
    rstd_BT1 = (centred_BTD.square().mean(2, keepdim=True) + eps).rsqrt()
    y_BTD = centred_BTD * rstd_BT1 * (1.0 + scale_BD.double()[:, None]) + shift_BD.double()[:, None]
    y_BTD = y_BTD.to(shift_BD.dtype).contiguous()
    if rows is not None and y_BTD.numel():
        values, scale = quantise(y_BTD.flatten(0, 1), "row")
        rows.values.copy_(values.view_as(y_BTD))
        rows.scale.copy_(scale.view_as(rows.scale))
    return sum_BTD, y_BTD, mean_BT1[:, :, 0].float(), rstd_BT1[:, :, 0].float()


def backward(
    d_sum_BTD: Tensor | None,
    d_y_BTD: Tensor,
    sum_BTD: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
    branch_BTD: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    scale_BD: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
    """(d_x, d_branch, d_gate, d_shift, d_scale, d_bias), None for what has no input."""
    rstd_BT1 = rstd_BT.double()[:, :, None]
    normed_BTD = (sum_BTD.double() - mean_BT.double()[:, :, None]) * rstd_BT1
    d_y64_BTD = d_y_BTD.double()
    d_shift_BD, d_scale_BD = d_y64_BTD.sum(1), (d_y64_BTD * normed_BTD).sum(1)
    g_BTD = d_y64_BTD * (1.0 + scale_BD.double()[:, None])
    along = (g_BTD * normed_BTD).mean(2, keepdim=True)
    d_x64_BTD = rstd_BT1 * (g_BTD - g_BTD.mean(2, keepdim=True) - normed_BTD * along)
    if d_sum_BTD is not None:
        d_x64_BTD = d_x64_BTD + d_sum_BTD.double()
    d_x_BTD = d_x64_BTD.to(sum_BTD.dtype).contiguous()
    d_shift_BD, d_scale_BD = (d.to(scale_BD.dtype) for d in (d_shift_BD, d_scale_BD))
    if branch_BTD is None or gate_BD is None:
        return d_x_BTD, None, None, d_shift_BD, d_scale_BD, None
    d_branch64_BTD = gate_BD.double()[:, None] * d_x64_BTD
    d_gate_BD = (biased(branch_BTD, bias_D) * d_x64_BTD).sum(1).to(gate_BD.dtype)
    d_bias_D = None if bias_D is None else d_branch64_BTD.sum((0, 1)).to(bias_D.dtype)
    d_branch_BTD = d_branch64_BTD.to(branch_BTD.dtype).contiguous()
    return d_x_BTD, d_branch_BTD, d_gate_BD, d_shift_BD, d_scale_BD, d_bias_D


def biased(branch_BTD: Tensor, bias_D: Tensor | None) -> Tensor:
    """The branch with its bias, in float64."""
    return branch_BTD.double() if bias_D is None else branch_BTD.double() + bias_D.double()
