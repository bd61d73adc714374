"""What the numbers of a stored sample mean: pixels, or an autoencoder's latents, and the way to model space and back.

x = (stored - shift) * scale        by channel; pixels: x in [-1, 1]
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Space:
    """Model space against what is stored.

    scale, shift: one number a channel of model space. posterior: stored arrays hold the mean and the
    standard deviation of the autoencoder's answer, twice the channels. vae: which autoencoder made
    the latents, as `encode` was told; None for pixels, or where nobody said.
    """

    kind: Literal["pixels", "latents"]
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    posterior: bool = False
    vae: str | None = None

    @staticmethod
    def pixels(channels: int) -> Space:
        """Bytes: x = stored / 127.5 - 1."""
        return Space("pixels", (1 / 127.5,) * channels, (127.5,) * channels)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Space:
        """The space that `to_json` wrote. Raises KeyError or TypeError for something else."""
        return Space(
            value["kind"],
            tuple(map(float, value["scale"])),
            tuple(map(float, value["shift"])),
            bool(value["posterior"]),
            value["vae"],
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"scale": list(self.scale), "shift": list(self.shift)}

    def to_model(
        self,
        stored: Tensor,
        normals: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Stored values [B, C or 2C, *space] to model space [B, C, *space] in `dtype`, same device.

        With a posterior the value is mean + std * normals, or the mean without normals. dtype: another
        than float32 is for latents; they are computed in float32 and rounded as they are written, so
        that no float32 copy of the batch is made. Raises ValueError for normals without a posterior,
        and for pixels in another dtype.
        """
        if normals is not None and not self.posterior:
            raise ValueError("normals are given, but no posterior is stored; draw no normals")
        if dtype != torch.float32:
            return self._rounded(stored, normals, dtype)
        if self.kind == "pixels":
            return stored.to(torch.float32).div_(127.5).sub_(1)
        values = stored.to(torch.float32, copy=True)
        if self.posterior:
            mean, std = values.chunk(2, 1)
            values = mean.clone() if normals is None else torch.addcmul(mean, std, normals.float())
        if any(self.shift):
            values.sub_(self._column(self.shift, values))
        return values.mul_(self._column(self.scale, values))

    def _rounded(self, stored: Tensor, normals: Tensor | None, dtype: torch.dtype) -> Tensor:
        """stored * scale - shift * scale, one pass; a posterior's draw is one more."""
        if self.kind == "pixels":
            raise ValueError(
                f"pixels in {dtype} would be moved by up to a quarter of a byte; take float32"
            )
        drawn = stored
        if self.posterior:
            mean, std = stored.chunk(2, 1)
            drawn = mean if normals is None else torch.addcmul(mean, std, normals.float())
        moved = tuple(-a * b for a, b in zip(self.shift, self.scale, strict=True))
        factor, offset = (
            _on_device(each, torch.float32, stored.device).view(-1, *[1] * (stored.dim() - 2))
            for each in (self.scale, moved)
        )
        out = torch.empty(drawn.shape, dtype=dtype, device=stored.device)
        return torch.addcmul(offset, drawn, factor, out=out)

    def to_stored(self, x: Tensor) -> Tensor:
        """The inverse of `to_model` for a sample without a posterior: x / scale + shift."""
        return x / self._column(self.scale, x) + self._column(self.shift, x)

    @staticmethod
    def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor | float:
        """A number a channel, shaped to meet [B, C, *space]; one float where all are equal."""
        if len(set(numbers)) == 1:
            return numbers[0]
        return _on_device(numbers, like.dtype, like.device).view(-1, *[1] * (like.dim() - 2))


@functools.lru_cache(maxsize=16)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied there once, not with every batch. Not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)
