"""Condition `augment`: pictures turned, scaled, stretched and moved in training, and the network told how.

Geometric augmentation that does not leak into samples, as Karras et al. train EDM on CIFAR-10 (arXiv 2206.00364,
appendix F.2): nine numbers say what was done to a picture; the network is told them, and zeros in sampling. No
data hold the condition: `conditions: {augment: {}}` makes it from the samples themselves. The network's keyword is the
condition's name -> float32 [B, 9]:

    0     mirrored left to right (a fair coin, always tossed)       1     mirrored top to bottom
    2     n, scaled by 2^(scale n)                                  3, 4  cos a - 1, sin a of a rotation by a
    5, 6  n cos b, n sin b: scaled by 2^(anisotropy n) along an axis turned by b and by 2^(-anisotropy n) across it
    7, 8  n, m: moved by `shift` times the width and the height

n, m ~ N(0, 1), a, b uniform. (5 and 6 do not tell n and b from -n and the opposite b; so it is in the paper.) All but
the first happen with the probability given, independently of each other. The numbers of a sample are a function of
(seed, step, global slot) alone.

Mirroring is exact. The rest is one matrix, and the picture is read once at its inverse, bicubically, reflected at its
borders; the paper reads it at twice the resolution through wavelet filters instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from speed_kernels import philox
from torch import Tensor

from speed_engine.data import ArrayFacts, ConditionFacts, Facts
from speed_engine.kinds import Section

WIDTH = 9  # numbers that the network is told
# Blocks of four words: of the coins and angles, then one of the normals.
BLOCKS = 4


class Config(Section):
    """How often and how far; the defaults are EDM's for CIFAR-10."""

    kind: Literal["augment"] = "augment"
    probability: float = Field(
        default=0.12, ge=0, le=1, description="of each transformation but the mirroring"
    )
    mirror: bool = Field(default=True, description="mirror half of the samples left to right")
    scale: float = Field(
        default=0.2, ge=0, le=1, description="deviation of the scaling, in powers of two"
    )
    anisotropy: float = Field(
        default=0.2, ge=0, le=1, description="deviation of the stretching, in powers of two"
    )
    shift: float = Field(
        default=0.125, ge=0, le=1, description="deviation of the translation over the width"
    )


def made(config: Config, name: str, facts: Facts) -> ConditionFacts:
    """What the condition is on these data. Raises ValueError where they are no pictures of pixels."""
    if len(facts.shape) != 3 or facts.space.kind != "pixels":
        raise ValueError(
            f"conditions.{name} turns and scales pictures, and the data are {facts.space.kind} of the shape "
            f"{list(facts.shape)}; take it out, or encode pixels"
        )
    return ConditionFacts("augment", {name: ArrayFacts((WIDTH,), "float32")}, null=True)


def build(config: Config, name: str, facts: ConditionFacts) -> Augment:
    """facts: what `made` gave, or what a file remembers of it."""
    return Augment(config, name, replace(facts, null=True))


class Augment:
    """See `speed_engine.conditions.Augmenting`."""

    def __init__(self, config: Config, name: str, facts: ConditionFacts) -> None:
        self.config, self.name, self.facts = config, name, facts

    def augment(
        self, x0: Tensor, seed: int, step: int, first_slot: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x0: pictures in model space, float32 [B, C, H, W], any device -> (the same transformed, the keywords)."""
        told_BK, turned_B22, moved_B2 = self.drawn(len(x0), seed, step, first_slot)
        x0 = _mirrored(_mirrored(x0, told_BK[:, 0], 3), told_BK[:, 1], 2)
        chosen = (told_BK[:, 2:] != 0).any(1).nonzero()[:, 0]
        if len(chosen):
            on = chosen.to(x0.device)
            back_B23 = _read_at(turned_B22[chosen], moved_B2[chosen], x0.shape[2:])
            x0 = x0.index_copy(0, on, _resampled(x0[on], back_B23.to(x0.device)))
        return x0, {self.name: told_BK.to(x0.device)}

    def drawn(
        self, batch: int, seed: int, step: int, first_slot: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """On the host: what the network is told, float32 [B, 9]; the matrix that turns and scales (x, y) about the
        picture's middle, float64 [B, 2, 2]; the translation in widths and heights, float64 [B, 2]."""
        config, slot_B = self.config, torch.arange(first_slot, first_slot + batch)
        bits_BK4 = philox.random_bits(seed, step, slot_B, philox.STREAM_AUGMENT, BLOCKS)
        uniform_BK = (bits_BK4[:, :-1].flatten(1).double() + 0.5) * 2.0**-32
        scaled_B, stretched_B, x_B, y_B = philox.box_muller(bits_BK4[:, -1]).unbind(1)
        coin_B, flip_B, *rest = uniform_BK[:, :8].unbind(1)
        flips, scales, rotates, stretches, angle_B, axis_B = rest
        moves = uniform_BK[:, 8]

        def happens(chance_B: Tensor) -> Tensor:
            return (chance_B < config.probability).double()

        mirror_B = (coin_B < 0.5).double() * config.mirror
        upside_B = (flip_B < 0.5).double() * happens(flips)
        scaled_B = scaled_B * happens(scales) * (config.scale > 0)
        angle_B = (2 * angle_B - 1) * math.pi * happens(rotates)
        stretched_B = stretched_B * happens(stretches) * (config.anisotropy > 0)
        axis_B = (2 * axis_B - 1) * math.pi
        moved_B2 = torch.stack([x_B, y_B], 1) * (happens(moves) * (config.shift > 0))[:, None]
        told = [mirror_B, upside_B, scaled_B, angle_B.cos() - 1, angle_B.sin()]
        told += [stretched_B * axis_B.cos(), stretched_B * axis_B.sin(), *moved_B2.unbind(1)]

        power_B = config.anisotropy * stretched_B
        along_B22 = torch.diag_embed(torch.stack([2.0**power_B, 2.0**-power_B], 1))
        stretch_B22 = _rotation(axis_B) @ along_B22 @ _rotation(-axis_B)
        size_B = 2.0 ** (config.scale * scaled_B)
        turned_B22 = stretch_B22 @ _rotation(angle_B) * size_B[:, None, None]
        return torch.stack(told, 1).float(), turned_B22, config.shift * moved_B2

    def drop(
        self, arrays: Mapping[str, Tensor], seed: int, step: int, first_slot: int
    ) -> dict[str, Tensor]:
        """Nothing is stored: `augment` makes the keywords."""
        return {}

    def null(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        return {self.name: torch.zeros(batch, WIDTH, device=device)}

    def asked(self, requests: Sequence[str]) -> dict[str, Tensor]:
        raise ValueError(
            f"{self.name} is what training did to its pictures, and samples are drawn as if nothing had been done; "
            f"leave {self.name}={requests[0]} out"
        )

    def default(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return self.null(len(numbers), "cpu")


def _rotation(angle_B: Tensor) -> Tensor:
    """[B, 2, 2]."""
    cos, sin = angle_B.cos(), angle_B.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def _mirrored(x_BCHW: Tensor, whether_B: Tensor, dim: int) -> Tensor:
    """Turned around along `dim` where not zero."""
    where = whether_B.to(x_BCHW.device).bool()[:, None, None, None]
    return torch.where(where, x_BCHW.flip(dim), x_BCHW)


def _read_at(turned_B22: Tensor, moved_B2: Tensor, sides: Sequence[int]) -> Tensor:
    """Where a pixel of the result is read, float32 [B, 2, 3], in torch's coordinates: -1 to 1 from edge to edge.

    There a translation by the share m of the width is 2 m, and a matrix acts between the half widths of both axes.
    """
    half = torch.tensor([sides[1] / 2, sides[0] / 2], dtype=torch.float64)
    back_B22 = torch.linalg.inv(turned_B22 * half / half[:, None])
    return torch.cat([back_B22, -back_B22 @ (2 * moved_B2)[:, :, None]], 2).float()


def _resampled(x_BCHW: Tensor, back_B23: Tensor) -> Tensor:
    places = F.affine_grid(back_B23, list(x_BCHW.shape), align_corners=False)
    return F.grid_sample(
        x_BCHW, places, mode="bicubic", padding_mode="reflection", align_corners=False
    )
