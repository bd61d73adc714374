"""From an image to tokens, what a transformer is given of each patch and of its place, and back."""

# Shape suffixes: B samples, C channels, H height, W width, T tokens, D hidden size.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.models.parts.time import MAX_PERIOD


def position_embedding(hidden_size: int, grid: int) -> Tensor:
    """The fixed embedding [1, grid * grid, D] of the tokens' places, fp32 (computed in fp64).

    Half of D encodes the column, the other half the row; each half is sines, then cosines, of the
    coordinate times D/4 frequencies from 1 down to 1/10000.
    """
    exponent = torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4)
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), 1 / MAX_PERIOD**exponent)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, D/2]
    columns, rows = axis.expand(grid, grid, -1), axis[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, hidden_size).float()


class PatchProjection(nn.Conv2d):
    """Image [B, C, H, W] -> tokens [B, T, D]: a convolution with stride = kernel, which is a matrix
    product. The product writes the tokens contiguously; a convolution's output, transposed, would
    leave the whole residual stream strided."""

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Conv2d gives it
        size = self.kernel_size[0]
        tiles = input.unfold(2, size, size).unfold(3, size, size)  # [B, C, H/size, W/size, .., ..]
        patches = tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


def image_of(out_BTX: Tensor, grid: int, patch: int) -> Tensor:
    """Tokens [B, grid * grid, patch * patch * C] -> image [B, C, grid * patch, grid * patch]."""
    tiles = out_BTX.unflatten(1, (grid, grid)).unflatten(3, (patch, patch, -1))
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
