"""A picture that a network is told beside x_t (`conditions.image`): further channels of its input.

A coarser picture is brought to x's grid by repeating its pixels. So the network gets the very numbers that the data
hold, the same on every device, and a mirrored picture stays one to the last bit; what lies between the pixels is what
it has to learn, and between two latents lies no latent.
"""

# Shape suffixes: B samples, C channels, H height, W width, D size of the embedding.

from __future__ import annotations

import torch
from torch import Tensor, nn

from speed_engine.data import Facts
from speed_engine.models.parts.time import TimeEmbedder

NAME = "image"
Pictures = tuple[Tensor | None, Tensor | None]  # the keywords `image` and `image_noise`
LEVELS = 1000  # levels of noise lie in [0, 1], and the sinusoids are made for times up to here


class Embedder(nn.Module):
    """x [B, C, H, W] and `Pictures` -> (both, channel after channel, in x's dtype; the level of noise, [B, D])."""

    def __init__(self, hidden_size: int, num_frequencies: int, frequency_shift: int) -> None:
        super().__init__()
        self.level = TimeEmbedder(hidden_size, num_frequencies, frequency_shift)

    def forward(self, x_BCHW: Tensor, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Raises ValueError for a picture without its level."""
        image_BCHW, level_B = pictures
        if image_BCHW is None or level_B is None:
            raise ValueError(f"this model needs {NAME} and {NAME}_noise, the level of noise in it")
        times = x_BCHW.shape[2] // image_BCHW.shape[2]
        image_BCHW = image_BCHW.to(x_BCHW.dtype)
        large_BCHW = image_BCHW.repeat_interleave(times, 2).repeat_interleave(times, 3)
        return torch.cat([x_BCHW, large_BCHW], 1), self.level(level_B * LEVELS, x_BCHW.dtype)


def input_channels(facts: Facts) -> int:
    """Of x and of the picture, where there is one. Raises ValueError for a picture that does not fit x's grid."""
    told = facts.conditions.get(NAME)
    if told is None:
        return facts.shape[0]
    channels, height, width = told.arrays[NAME].shape
    times = max(1, facts.shape[1] // height)
    if facts.shape[1:] != (times * height, times * width):
        raise ValueError(
            f"conditions.{NAME}: pictures of {height}x{width} cannot be enlarged to samples of "
            f"{'x'.join(map(str, facts.shape[1:]))} by a whole number; encode the data with another --low-resolution"
        )
    return facts.shape[0] + channels
