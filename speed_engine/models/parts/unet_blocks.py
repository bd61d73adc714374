"""What a U-Net is made of: norm with SiLU, residual block, attention, resampling; channels-last throughout."""

# Shape suffixes: B samples, C channels, H height, W width, T = H W tokens, D size of the embedding,
# 3 = (seed, step, first slot) of addressed dropout.

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from speed_kernels.dropout.op import dropout
from speed_kernels.group_norm_silu.op import group_norm_silu
from torch import Tensor, nn

from speed_engine.models.parts.blocks import Attention
from speed_engine.models.parts.unet_layout import (
    Size,
    Stage,
    has_shortcut,
    num_groups,
    num_heads,
)

NORM, DROPOUT = "group_norm_silu", "dropout"
OPS = (NORM, DROPOUT)  # what a U-Net asks of speed_kernels


class NormSiLU(nn.GroupNorm):
    """Group norm with weight and bias, statistics in fp32 whatever the dtype; then SiLU, unless `silu` is False.

    backend: of the op `group_norm_silu`; None: plain torch.
    """

    def __init__(self, channels: int, eps: float, backend: str | None, silu: bool = True) -> None:
        super().__init__(num_groups(channels), channels, eps)
        self.backend, self.silu = backend, silu

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.GroupNorm gives it
        if self.backend is not None:
            return group_norm_silu(
                input,
                self.weight,
                self.bias,
                num_groups=self.num_groups,
                eps=self.eps,
                silu=self.silu,
                backend=self.backend,
            )
        # autocast would return fp32, and torch's kernels keep their statistics in fp32 by themselves
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
            y = F.group_norm(input, self.num_groups, weight, bias, self.eps)
            return F.silu(y) if self.silu else y


class ShiftedConv(nn.Conv2d):
    """A 3x3 convolution plus a shift a sample and channel. The bias is added to the shift, which is small: neither the
    bias nor its gradient costs a pass over the image."""

    def forward(self, input: Tensor, shift_BC: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_BCHW = F.conv2d(input, self.weight, None, padding=self.padding)
        assert self.bias is not None
        return y_BCHW + (shift_BC + self.bias.to(shift_BC.dtype))[:, :, None, None]


def halve(x_BCHW: Tensor) -> Tensor:
    """The mean of every 2x2 pixels."""
    return F.avg_pool2d(x_BCHW, 2)


def double(x_BCHW: Tensor) -> Tensor:
    """Every pixel four times."""
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


class DoublingConv(nn.Conv2d):
    """A 3x3 convolution of an image whose every pixel is there four times.

    Three taps in a row see two different pixels. On a CPU, where arithmetic is what costs, the weights of those that
    see the same one are added first: a transposed convolution, of 4 products a pixel instead of 9.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(double(input))
        taps_43 = self.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        kernel = torch.kron(taps_43, taps_43) @ self.weight.permute(1, 2, 3, 0).flatten(1, 2)
        kernel = kernel.unflatten(1, (4, 4)).permute(0, 3, 1, 2)  # in channels-last memory
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


class ImageAttention(nn.Module):
    """Self-attention over all pixels, added to the image."""

    def __init__(self, channels: int, size: Size, norm: str | None, attention: str) -> None:
        super().__init__()
        self.norm = NormSiLU(channels, size.norm_eps, norm, silu=False)
        heads = num_heads(size, channels)
        self.attn = Attention(channels, heads, attention, bias_later=False)
        self.scale = size.residual_scale

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Pixels in channels-last memory are tokens already.
        tokens_BTC = self.norm(x_BCHW).permute(0, 2, 3, 1).flatten(1, 2)
        branch_BTC = self.attn(self.attn.qkv(tokens_BTC))
        branch_BHWC = branch_BTC.unflatten(1, x_BCHW.shape[2:])
        return scaled_sum(x_BCHW, branch_BHWC.permute(0, 3, 1, 2), self.scale)


class ResidualBlock(nn.Module):
    """Two convolutions, each after norm and SiLU, added to their input; time and conditions shift (and scale) between.

    number: of the block, which tells its dropout from that of others. backends: of `OPS`; None: plain torch.
    """

    def __init__(
        self,
        stage: Stage,
        size: Size,
        number: int,
        attention: str,
        backends: Mapping[str, str] | None,
    ) -> None:
        super().__init__()
        inputs, outputs = stage.num_inputs, stage.num_outputs
        norm = None if backends is None else backends[NORM]
        self.scale_shift = size.modulation == "scale_shift"
        self.norm1 = NormSiLU(inputs, size.norm_eps, norm)
        conv = nn.Conv2d if self.scale_shift else ShiftedConv
        self.conv1 = conv(inputs, outputs, 3, padding=1)
        self.embedding = nn.Linear(4 * size.width, outputs * (1 + self.scale_shift))
        self.norm2 = NormSiLU(outputs, size.norm_eps, norm, silu=not self.scale_shift)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if has_shortcut(size, stage) else None
        self.attention = ImageAttention(outputs, size, norm, attention) if stage.attention else None
        self.resample = {"": None, "down": halve, "up": double}[stage.resample]
        self.scale, self.dropout, self.number = size.residual_scale, size.dropout, number
        self.dropout_backend = "reference" if backends is None else backends[DROPOUT]

    def forward(self, x_BCHW: Tensor, told_BX: Tensor, drop_at_3: Tensor | None) -> Tensor:
        """told: what `embedding` gave. drop_at: the address of dropout; None: nothing is dropped."""
        h_BCHW = self.norm1(x_BCHW)
        if self.resample is not None:
            h_BCHW, x_BCHW = self.resample(h_BCHW), self.resample(x_BCHW)
        if self.scale_shift:
            scale_BC, shift_BC = told_BX.chunk(2, dim=1)
            h_BCHW = self.norm2(self.conv1(h_BCHW)) * (1 + scale_BC[:, :, None, None])
            h_BCHW = F.silu(h_BCHW + shift_BC[:, :, None, None])
        else:
            h_BCHW = self.norm2(self.conv1(h_BCHW, told_BX))
        if drop_at_3 is not None:
            h_BCHW = dropout(
                h_BCHW,
                drop_at_3,
                layer=self.number,
                p=self.dropout,
                backend=self.dropout_backend,
            )
        if self.shortcut is not None:
            x_BCHW = self.shortcut(x_BCHW)
        x_BCHW = scaled_sum(x_BCHW, self.conv2(h_BCHW), self.scale)
        return x_BCHW if self.attention is None else self.attention(x_BCHW)


class Resampling(nn.Module):
    """Half or double the height and width, with or without a convolution."""

    def __init__(self, stage: Stage, size: Size) -> None:
        super().__init__()
        down = stage.resample == "down"
        conv = size.resample == "conv"
        self.resample = None if conv else halve if down else double
        sizes = (stage.num_outputs, stage.num_outputs, 3)
        self.conv: nn.Conv2d | None = None
        if conv:
            self.conv = nn.Conv2d(*sizes, 2, padding=1) if down else DoublingConv(*sizes, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.resample is not None:
            x_BCHW = self.resample(x_BCHW)
        return x_BCHW if self.conv is None else self.conv(x_BCHW)


def scaled_sum(x_BCHW: Tensor, branch_BCHW: Tensor, scale: float) -> Tensor:
    """Their sum, times a constant."""
    total = x_BCHW + branch_BCHW
    return total if scale == 1.0 else total * scale
