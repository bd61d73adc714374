"""A small network that looks at a clean sample and answers with the two numbers of a Beta
distribution over time steps.

Three 3x3 convolutions with pooling, an adaptive pool to 4x4 (so any latent shape will do: a
sequence is one pixel high, a video is its frames one below the other, a vector one pixel), two
hidden layers, softplus. The last layer starts at weight 0 and bias 0.5, so the policy starts as
Beta(0.974, 0.974), nearly uniform.

Shape legend: B samples, C channels, T rows, P = 16 parts of the pooled image, Q its pixels before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NUM_OUTPUTS = 2


class BetaPolicy(nn.Module):
    """x0 [B, *shape] -> log probability of every row, float32 [B, T]; `shape` is [C, ...]."""

    position_T: Tensor
    pool_PQ: Tensor

    def __init__(self, shape: tuple[int, ...], num_rows: int, hidden: int = 256) -> None:
        super().__init__()
        # The same weights on every rank, and the caller's generator left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.image = nn.Sequential(
                *_stage(shape[0], 32),
                *_stage(32, 64),
                *_stage(64, 128),
            )
            self.head = nn.Sequential(
                nn.Linear(128 * 16, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, NUM_OUTPUTS),
            )
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, 0.5)
        down, across = (_averages(-(-size // 8)) for size in _as_image(shape)[1:])
        self.register_buffer("pool_PQ", torch.kron(down, across), persistent=False)
        position_T = (torch.arange(num_rows) + 0.5) / num_rows
        self.register_buffer("position_T", position_T, persistent=False)

    def shapes(self, x0: Tensor) -> Tensor:
        """The two positive numbers (alpha, beta) of every sample's Beta distribution; float32 [B,
        2].
        """
        image = x0.float().reshape(x0.shape[0], *_as_image(x0.shape[1:]))
        # The draw is made at every training step, and pooling is twice as fast in this format.
        features_BCQ = self.image(image.contiguous(memory_format=torch.channels_last)).flatten(2)
        first, *rest = self.head
        assert isinstance(first, nn.Linear)
        return (
            nn.functional.softplus(nn.Sequential(*rest)(self._pooled(features_BCQ, first))) + 1e-5
        )

    def _pooled(self, features_BCQ: Tensor, first: nn.Linear) -> Tensor:
        """`first` of the features averaged over 4x4 parts (nn.AdaptiveAvgPool2d(4)).

        Of less than 16 pixels the averages would repeat them; then the weights are added up instead.
        """
        parts, pixels = self.pool_PQ.shape
        if pixels >= parts:
            return first((features_BCQ @ self.pool_PQ.T).flatten(1))
        weight = (first.weight.view(-1, parts) @ self.pool_PQ).view(first.out_features, -1)
        return nn.functional.linear(features_BCQ.flatten(1), weight, first.bias)

    def forward(self, x0: Tensor) -> Tensor:
        """log P(row | x0): the Beta density at the middles of T equal cells, normalised over them."""
        shapes_B2 = self.shapes(x0)
        log_mass_BT = (shapes_B2[:, :1] - 1) * self.position_T.log()
        log_mass_BT = log_mass_BT + (shapes_B2[:, 1:] - 1) * torch.log1p(-self.position_T)
        return log_mass_BT.log_softmax(dim=1)


class Halved(nn.Module):
    """2x2 max-pooling; of an odd size the last row or column is pooled alone.

    nn.MaxPool2d says the same, but on CPUs it also notes where each maximum was, one by one; the
    draw of every training step waits for it. The ReLU behind it commutes with a maximum.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x, odd = x_BCHW, (0, x_BCHW.shape[3] % 2, 0, x_BCHW.shape[2] % 2)
        if any(odd):
            x = nn.functional.pad(x, odd, value=float("-inf"))
        columns = torch.maximum(x[..., ::2], x[..., 1::2])
        return torch.maximum(columns[:, :, ::2], columns[:, :, 1::2])


def _averages(size: int) -> Tensor:
    """[4, size]: row i averages the places from floor(i size / 4) to ceil((i + 1) size / 4)."""
    place, part = torch.arange(size), torch.arange(4)[:, None]
    inside = (place >= part * size // 4) & (place < -(-(part + 1) * size // 4))
    return inside / inside.sum(dim=1, keepdim=True)


def _as_image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """[C, ...] -> [C, H, W] with the same elements."""
    channels, *rest = shape
    width = rest[-1] if rest else 1
    return channels, math.prod(rest[:-1]), width


def _stage(channels_in: int, channels_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    return [convolution, Halved(), nn.ReLU()]
