"""What a network knows of the time: sinusoids of it, then an MLP."""

# Shape suffixes: B samples, D size of the embedding, F frequencies.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10_000.0


class TimeEmbedder(nn.Module):
    """Time [B] -> [B, D]: cosines, then sines, of the time times F frequencies from 1 down to 1/10000,
    in fp32, then an MLP.

    frequency_shift: 1 if the last frequency is 1/10000 itself, 0 if that would be the next one.
    """

    def __init__(self, hidden_size: int, num_frequencies: int, frequency_shift: int) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.step = -math.log(MAX_PERIOD) / (num_frequencies - frequency_shift)
        first = nn.Linear(2 * num_frequencies, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(
        self, time_B: Tensor, dtype: torch.dtype, further_B2F: Tensor | None = None
    ) -> Tensor:
        """further: something to be added to the sinusoids, if any. dtype: of the products."""
        # Made on the device at each call, with nothing copied from the host; a buffer would be
        # ruined by casting the module to bf16, where 999 times a frequency is radians off.
        index_F = torch.arange(self.num_frequencies, device=time_B.device, dtype=torch.float32)
        angle_BF = time_B.float()[:, None] * torch.exp(index_F * self.step)
        sinusoids_B2F = torch.cat([angle_BF.cos(), angle_BF.sin()], dim=1).to(dtype)
        return self.mlp(sinusoids_B2F if further_B2F is None else sinusoids_B2F + further_B2F)
