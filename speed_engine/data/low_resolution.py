"""Pictures at low resolution, which a network that sharpens is told (`conditions.image`): made from the samples when
data are encoded (`encode --low-resolution`), and read from a folder when it is asked (`sample --low-resolution`).

A pixel of the low picture is the mean of a square of the sample's, rounded: what of a sample can be checked against the
picture that it was drawn for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_engine.conditions import image
from speed_engine.data import DataError
from speed_engine.data.autoencoder import Vae
from speed_engine.data.space import Space
from speed_engine.data.storage import pictures, places
from speed_engine.data.storage.folders import shown
from speed_engine.data.storage.index import StoredCondition

NAME = "image"
AT_A_TIME = 32  # pictures that an autoencoder is given together


def check(side: int | None, size: int) -> None:
    """Refuse a low resolution that does not divide the samples' side. Raises DataError."""
    if side is not None and (side < 1 or side >= size or size % side):
        raise DataError(
            f"--low-resolution {side} does not divide the size {size}; give a smaller number that does"
        )


def plan(side: int | None) -> dict[str, Any]:
    """What decides the low pictures of a set, for `Job.plan`."""
    return {} if side is None else {"low_resolution": side}


def beside(pixels_CHW: np.ndarray, side: int | None) -> Mapping[str, np.ndarray]:
    """The named array that lies beside a picture; none without a side."""
    return {} if side is None else {NAME: reduced(pixels_CHW, side)}


def reduced(pixels_CHW: np.ndarray, side: int) -> np.ndarray:
    """uint8 [C, H, W] -> uint8 [C, side, side]: means of squares."""
    channels, height, width = pixels_CHW.shape
    blocks = pixels_CHW.reshape(channels, side, height // side, side, width // side)
    return np.round(blocks.mean((2, 4))).astype(np.uint8)


def as_latents(encoder: Vae, side: int, flip: bool) -> tuple[StoredCondition, list[int]]:
    """Of low pictures through an autoencoder: (what the index says, the bytes of each array). Raises DataError."""
    if side % encoder.factor:
        raise DataError(
            f"--low-resolution {side} is no multiple of {encoder.factor}, the VAE's pixels a latent; correct it"
        )
    channels, inner = encoder.latent_channels, side // encoder.factor
    scale, shift = (
        each if isinstance(each, tuple) else (each,) * channels
        for each in (encoder.scale, encoder.shift)
    )
    space = Space("latents", scale, shift, vae=encoder.identity)
    facts = image.described((channels, inner, inner), space, mirrored=flip)
    stored = StoredCondition(kind="image", arrays=list(facts.arrays), details=dict(facts.details))
    return stored, [2 * channels * inner**2] * (1 + flip)


def read(place: Path, condition: image.Image, encoder: Vae | None) -> tuple[list[str], Tensor]:
    """The pictures of a folder (or tars, or a table) that the network is to sharpen, as it is told them.

    encoder: the autoencoder of a network that is told latents; None: it is told pixels. Returns their names, without
    endings, and what a set would hold [N, C, h, w], in the order of the names. Raises DataError, naming the picture,
    for one of another size or that cannot be read, and for two of one name.
    """
    channels, *sides = condition.shape
    if encoder is not None:
        channels, sides = encoder.channels, [side * encoder.factor for side in sides]
    height, width = sides
    listing = places.find(place, labels=False)
    names = [_name(each.path) for each in listing.pictures]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{place} holds two pictures of the name {twice[0]}; rename one")

    def load(picture: pictures.Picture) -> np.ndarray:
        try:
            return pictures.decode_whole(listing.load(picture), channels, (width, height))
        except pictures.PictureError as error:
            raise DataError(f"{place}/{shown(picture.path)}: {error}") from None

    with ThreadPoolExecutor() as pool:
        pixels_NCHW = np.stack(list(pool.map(load, listing.pictures)))
    if encoder is None:
        return names, torch.from_numpy(pixels_NCHW)
    parts = np.array_split(pixels_NCHW, -(-len(pixels_NCHW) // AT_A_TIME))
    latents_NCHW = np.concatenate([encoder.encode(part, posterior=False) for part in parts])
    return names, torch.from_numpy(latents_NCHW)


def _name(path: str) -> str:
    """Of a picture in a sub-folder the folder's, too: one folder holds the samples."""
    return "_".join(PurePosixPath(shown(path)).with_suffix("").parts)
