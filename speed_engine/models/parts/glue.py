"""What runs between the matrix products of a DiT: residual stream, norm, modulation, GELU.

A `Glue` offers each piece once, either as fused kernels or as plain torch. The fused kernels add the
biases of the products before them, so a `Product` leaves its bias to the glue where that is fused.
"""

# Shape suffixes: B samples, T tokens, D hidden size, X any.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from speed_kernels.bias_gelu.op import bias_gelu
from speed_kernels.e4m3 import Scaled
from speed_kernels.gate_residual_norm_modulate.op import (
    gate_residual_norm_modulate,
    norm_modulate,
)
from speed_kernels.gate_residual_norm_modulate.op_e4m3 import (
    gate_residual_norm_modulate_e4m3,
    norm_modulate_e4m3,
)
from torch import Tensor, nn

NORM, GELU = "gate_residual_norm_modulate", "bias_gelu"
OPS = (NORM, GELU)  # what a model asks of speed_kernels
EPS = 1e-6


class Normed(NamedTuple):
    """What a product takes: y [B, T, D] and, where a fused kernel made them and the product multiplies
    them, y's rows in e4m3 [B, T, D] with their scales [B, T, 1]."""

    y: Tensor
    rows: Scaled | None = None


class Product(nn.Linear):
    """A linear layer, whose bias the next piece of glue adds where `bias_later`."""

    takes_rows = False  # what it multiplies is the input itself

    def __init__(self, num_inputs: int, num_outputs: int, bias_later: bool) -> None:
        super().__init__(num_inputs, num_outputs)
        self.bias_later = bias_later

    def forward(self, input: Tensor, rows: Scaled | None = None) -> Tensor:
        """input [..., K] -> [..., N]; rows: for a product in e4m3 (`Normed`), never for this one."""
        assert rows is None
        return F.linear(input, self.weight, None if self.bias_later else self.bias)


class Glue:
    """`backends`: op of `OPS` -> triton, cpp or reference, for fused kernels; None: plain torch."""

    def __init__(self, backends: Mapping[str, str] | None) -> None:
        self.fused = backends is not None
        self.backends = dict(backends or {})

    def norm(self, x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
        """LayerNorm without parameters, statistics in fp32 whatever the dtype; then scale and
        shift, in their dtype."""
        if self.fused:
            return norm_modulate(x_BTD, shift_BD, scale_BD, eps=EPS, backend=self.backends[NORM])
        return modulated_norm(x_BTD, shift_BD, scale_BD)

    def norm_for(
        self, x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, takes_rows: bool
    ) -> Normed:
        """`norm`, for a product that takes rows in e4m3 or does not."""
        if not (self.fused and takes_rows):
            return Normed(self.norm(x_BTD, shift_BD, scale_BD))
        options: dict[str, Any] = {"eps": EPS, "backend": self.backends[NORM]}
        y_BTD, *rows = norm_modulate_e4m3(x_BTD, shift_BD, scale_BD, **options)
        return Normed(y_BTD, Scaled(*rows))

    def add_and_norm(
        self,
        x_BTD: Tensor,
        branch_BTD: Tensor,
        bias_D: Tensor,
        gate_BD: Tensor,
        shift_BD: Tensor,
        scale_BD: Tensor,
        takes_rows: bool = False,
    ) -> tuple[Tensor, Normed]:
        """The residual stream plus a gated branch, and `norm_for` of that.

        branch_BTD is what a `Product` gave, bias_D that product's bias.
        """
        if not self.fused:
            x_BTD = gated_add(x_BTD, branch_BTD, gate_BD)
            return x_BTD, Normed(modulated_norm(x_BTD, shift_BD, scale_BD))
        inputs = (x_BTD, branch_BTD, gate_BD, shift_BD, scale_BD)
        options: dict[str, Any] = {"eps": EPS, "backend": self.backends[NORM]}
        options["bias_D"] = bias_D.to(branch_BTD.dtype)
        if takes_rows:
            x_BTD, y_BTD, *rows = gate_residual_norm_modulate_e4m3(*inputs, **options)
            return x_BTD, Normed(y_BTD, Scaled(*rows))
        x_BTD, y_BTD = gate_residual_norm_modulate(*inputs, **options)
        return x_BTD, Normed(y_BTD)

    def gelu(self, hidden_BTX: Tensor, bias_X: Tensor) -> Tensor:
        """GELU in the tanh form of what a `Product` gave; bias_X is that product's bias."""
        if self.fused:
            bias_X = bias_X.to(hidden_BTX.dtype)
            return bias_gelu(hidden_BTX, bias_X, backend=self.backends[GELU])
        return F.gelu(hidden_BTX, approximate="tanh")


# The same in plain torch.


def modulated_norm(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """LayerNorm without parameters, statistics in fp32 whatever the dtype; then scale and shift."""
    # autocast would return fp32, and does no harm to the statistics if it is not asked.
    with torch.autocast(x_BTD.device.type, enabled=False):
        normed_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=EPS).to(shift_BD.dtype)
    return normed_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def gated_add(x_BTD: Tensor, branch_BTD: Tensor, gate_BD: Tensor) -> Tensor:
    """The residual stream, in its dtype, plus a gated branch."""
    return x_BTD + gate_BD[:, None] * branch_BTD
