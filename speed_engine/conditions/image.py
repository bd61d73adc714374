"""Condition `image`: a picture of each sample on a grid as fine as x's or coarser, of super-resolution the low one.

What lies beside a sample, in a set whose condition is called `image` (`encode --low-resolution` writes it):

    image            uint8 [C, h, w]: pixels, or float16, float32: latents, in the space that `facts.details` names
    image_mirrored   the same of the mirrored sample, where x has one of its own (latents); pixels are turned around

The network's keywords are `image` -> float32 [B, C, h, w] in model space, and `image_noise` -> float32 [B], the level s
in [0, 1] of noise in it. Training draws s uniformly below `noise` and tells sqrt(1 - s^2) image + s n, n ~ N(0, 1): the
conditioning augmentation of Ho et al. (arXiv 2106.15282, section 4), by which a network bears with pictures that are
worse than those of its data. Samples are told level 0, or one that is asked for. "None" is a picture of which nothing
is left: zeros, at level 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from speed_kernels import philox
from torch import Tensor

from speed_engine.conditions import dropped
from speed_engine.data import ArrayFacts, ConditionFacts
from speed_engine.data.space import Space
from speed_engine.kinds import Section


class Config(Section):
    """How often training forgets the picture, and how much noise it puts into it."""

    kind: Literal["image"] = "image"
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of pictures left out, for guidance"
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="largest level of noise in the picture in training, drawn uniformly from 0 on (conditioning "
        "augmentation)",
    )


def described(
    shape: tuple[int, int, int], space: Space, *, mirrored: bool = False, name: str = "image"
) -> ConditionFacts:
    """What a set says of its pictures [C, h, w]. mirrored: whether those of mirrored samples lie beside them."""
    array = ArrayFacts(shape, "uint8" if space.kind == "pixels" else "float16")
    names = [name, f"{name}_mirrored"] if mirrored else [name]
    details = {"space": space.to_json()}
    return ConditionFacts("image", dict.fromkeys(names, array), details=details)


def build(config: Config, name: str, facts: ConditionFacts) -> Image:
    """Raises ValueError where the set holds no pictures under this name."""
    array = facts.arrays.get(name)
    kinds = ("uint8", "float16", "float32")
    if array is None or len(array.shape) != 3 or array.dtype not in kinds:
        raise ValueError(
            f"conditions.{name} is an image, but the data hold no picture [C, h, w] under {name}; encode them with "
            "--low-resolution, or take it out"
        )
    details = dict(facts.details)
    if config.noise:  # a weights file remembers it, and knows no configuration
        details["noise"] = config.noise
    return Image(name, replace(facts, null=config.dropout > 0, details=details), config.dropout)


class Image:
    """See `speed_engine.conditions`: `Condition`, `Mirroring` and `Noising`.

    shape: (C, h, w). space: what stored numbers mean. noise: the largest level that the network has learned.
    """

    def __init__(self, name: str, facts: ConditionFacts, dropout: float) -> None:
        self.name, self.facts, self.dropout = name, facts, dropout
        array = facts.arrays[name]
        self.shape, self.noise = array.shape, float(facts.details.get("noise", 0))
        if "space" in facts.details:
            self.space = Space.from_json(facts.details["space"])
        elif array.dtype == "uint8":
            self.space = Space.pixels(self.shape[0])
        else:  # another tool's arrays are taken as they are
            self.space = Space("latents", (1.0,) * self.shape[0], (0.0,) * self.shape[0])

    def mirrored(self, arrays: Mapping[str, Tensor], flips_B: Tensor) -> Mapping[str, Tensor]:
        if not flips_B.any():
            return arrays
        image_BCHW, other_BCHW = arrays[self.name], arrays.get(f"{self.name}_mirrored")
        if other_BCHW is None and self.space.kind == "latents":
            raise ValueError(
                f"the latents under {self.name} cannot be turned around, and the data hold no {self.name}_mirrored; "
                "encode them again with --flip, or set train.flip=false"
            )
        turned_BCHW = image_BCHW.flip(3) if other_BCHW is None else other_BCHW
        chosen_BCHW = torch.where(flips_B[:, None, None, None], turned_BCHW, image_BCHW)
        return {**arrays, self.name: chosen_BCHW}

    def drop(
        self, arrays: Mapping[str, Tensor], seed: int, step: int, first_slot: int
    ) -> dict[str, Tensor]:
        told = self.told(arrays[self.name])
        if self.dropout == 0:
            return told
        slot_B = np.arange(first_slot, first_slot + len(arrays[self.name]))
        dropped_B = dropped(self.name, self.dropout, seed, step, slot_B)
        none = self._none(len(slot_B), "cpu")
        return {
            name: torch.where(dropped_B.view(-1, *[1] * (each.dim() - 1)), none[name], each)
            for name, each in told.items()
        }

    def noised(
        self, told: Mapping[str, Tensor], seed: int, step: int, first_slot: int
    ) -> dict[str, Tensor]:
        if self.noise == 0:
            return {}
        before_B = told[f"{self.name}_noise"]
        batch, device = len(before_B), before_B.device
        slot_B = torch.arange(first_slot, first_slot + batch, device=device)
        word_B = philox.random_bits(seed, step, slot_B, philox.STREAM_IMAGE_NOISE, 1)[:, 0, 0]
        level_B = (word_B.double() * 2.0**-32 * self.noise).float()
        level_B = torch.where(before_B == 1, 0.0, level_B)  # of what is dropped nothing is left
        image_BCHW = self._with_noise(told[self.name], level_B, seed, step, slot_B)
        return {self.name: image_BCHW, f"{self.name}_noise": before_B + level_B}

    def told(self, stored_BCHW: Tensor) -> dict[str, Tensor]:
        """The keywords of stored pictures, float32, without noise."""
        level_B = torch.zeros(len(stored_BCHW), device=stored_BCHW.device)
        return {self.name: self.space.to_model(stored_BCHW), f"{self.name}_noise": level_B}

    def at_level(self, told: Mapping[str, Tensor], level: float, seed: int) -> dict[str, Tensor]:
        """`told` of samples 0, 1, ... with noise of one level. Raises ValueError for one that was not learned."""
        if not 0 <= level <= self.noise:
            learned = (
                f"from 0 to {self.noise:g}, as it was trained"
                if self.noise
                else f"0 alone: it was trained with conditions.{self.name}.noise=0"
            )
            raise ValueError(f"noise of level {level:g}: the network knows levels {learned}")
        slot_B = torch.arange(len(told[self.name]))
        level_B = torch.full((len(slot_B),), level)
        image_BCHW = self._with_noise(told[self.name], level_B, seed, 0, slot_B)
        return {self.name: image_BCHW, f"{self.name}_noise": level_B}

    def _with_noise(
        self, image_BCHW: Tensor, level_B: Tensor, seed: int, step: int, slot_B: Tensor
    ) -> Tensor:
        """Block 0 of a sample's words is its level's, the others are its normals'."""
        num, stream = math.prod(self.shape), philox.STREAM_IMAGE_NOISE
        bits_BK4 = philox.random_bits(seed, step, slot_B, stream, -(-num // 4), first_block=1)
        normal_BN = philox.box_muller(bits_BK4).flatten(1)[:, :num].float()
        level_B111 = level_B[:, None, None, None]
        kept_B111 = (1 - level_B111.square()).sqrt()
        return kept_B111 * image_BCHW + level_B111 * normal_BN.view_as(image_BCHW)

    def _none(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        image_BCHW = torch.zeros(batch, *self.shape, device=device)
        return {self.name: image_BCHW, f"{self.name}_noise": torch.ones(batch, device=device)}

    def null(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        if not self.facts.null:
            raise ValueError(
                f"this network has no null {self.name}: it was trained with conditions.{self.name}.dropout=0"
            )
        return self._none(batch, device)

    def asked(self, requests: Sequence[str]) -> dict[str, Tensor]:
        """Files of one stored picture each: .npy, [C, h, w]. (Folders of pictures: `sample --low-resolution`.)"""
        found = {request: self._read(request) for request in dict.fromkeys(requests)}
        return self.told(torch.stack([found[request] for request in requests]))

    def default(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        if self.facts.null:
            return self.null(len(numbers), "cpu")
        raise ValueError(
            f"this network must be told {self.name}; give --low-resolution DIR, a folder of pictures or an encoded set"
        )

    def _read(self, file: str) -> Tensor:
        try:
            array = np.load(Path(file).expanduser(), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise ValueError(
                f"{self.name} {file} cannot be read; give a .npy file of one picture {list(self.shape)}, or a folder "
                "of pictures with --low-resolution"
            ) from None
        kind = self.facts.arrays[self.name].dtype
        if array.shape != self.shape or (array.dtype.kind == "u") != (kind == "uint8"):
            raise ValueError(
                f"{self.name} {file} is {array.dtype} {list(array.shape)}, and the network is told {kind} "
                f"{list(self.shape)}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{self.name} {file} holds NaN or infinity")
        return torch.from_numpy(np.ascontiguousarray(array))
