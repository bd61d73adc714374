"""What a network that sharpens is asked: the pictures of a folder, or of an encoded set (`sample --low-resolution`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from speed_engine.conditions import Condition, undropped
from speed_engine.conditions.image import Image
from speed_engine.data import low_resolution
from speed_engine.data.autoencoder import Vae
from speed_engine.data.shards import Shards
from speed_engine.data.storage.index import INDEX


class Asked(NamedTuple):
    """told: the keywords of every condition that `place` decides. names: of the samples; None: their numbers."""

    num: int
    told: dict[str, Tensor]
    names: list[str] | None


def asked(
    place: Path,
    conditions: Mapping[str, Condition],
    *,
    num: int | None,
    level: float,
    seed: int,
    vae: str | None,
    device: torch.device | str,
) -> Asked:
    """The first `num` pictures of `place` (None: all), for a network with these conditions.

    Of a folder of pictures the network is told these alone, and "none" of its other conditions; of a set that was
    encoded with --low-resolution all that lies beside its samples. level: noise that is put into the pictures, at
    addresses of `seed`. vae: encodes the pictures of a folder, for a network that is told latents.
    Raises ValueError (and DataError) for a network that is told no picture, pictures of another size, or too few.
    """
    name, condition = _told_pictures(conditions)
    names = None
    if (place / INDEX).is_file():
        told = _of_set(place, conditions, name, condition)
    else:
        encoder = _encoder(condition, vae, device)
        names, stored = low_resolution.read(place, condition, encoder)
        told = condition.told(stored)
    there = len(told[name])
    count = there if num is None else num
    if count > there:
        raise ValueError(
            f"--num {count}, and {place} holds {there} pictures; give --num of at most {there}, or leave it out"
        )
    told = {key: value[:count] for key, value in told.items()}
    if level:
        told |= condition.at_level(told, level, seed)
    return Asked(count, told, names[:count] if names else None)


def _told_pictures(conditions: Mapping[str, Condition]) -> tuple[str, Image]:
    for name, condition in conditions.items():
        if isinstance(condition, Image):
            return name, condition
    there = ", ".join(conditions) or "nothing"
    raise ValueError(
        f"--low-resolution is for networks that are told a picture; this one is told {there}"
    )


def _encoder(condition: Image, vae: str | None, device: torch.device | str) -> Vae | None:
    """What makes of a picture what the network is told; None: its pixels are. Raises ValueError."""
    space, channels = condition.space, condition.shape[0]
    if (space.kind == "latents" and space.vae is None) or (
        space.kind == "pixels" and channels not in (1, 3)
    ):
        raise ValueError(
            f"the network is told arrays {list(condition.shape)} that were no pictures of --low-resolution; give an "
            f"encoded set that holds them, or --condition {condition.name}=FILE.npy"
        )
    if space.kind == "pixels":
        return None
    if vae is None:
        raise ValueError(
            f"the network is told latents of its pictures; give --vae, which encodes them (the data's: {space.vae})"
        )
    encoder = Vae(vae, device)
    if encoder.latent_channels != channels:
        raise ValueError(
            f"the VAE {vae!r} has latents of {encoder.latent_channels} channels, and the network is told {channels}; "
            f"give the one that encoded the data, {space.vae}"
        )
    return encoder


def _of_set(
    place: Path, conditions: Mapping[str, Condition], name: str, condition: Image
) -> dict[str, Tensor]:
    """The keywords of all samples of an encoded set."""
    source = Shards(place, check_scale=False)
    held = source.facts.conditions.get(name)
    found = None if held is None else held.arrays.get(name)
    wanted = condition.facts.arrays[name]
    if found != wanted:
        there = "no" if found is None else f"{found.dtype} {list(found.shape)}"
        raise ValueError(
            f"{place} holds {there} pictures under {name}, and the network is told {wanted.dtype} "
            f"{list(wanted.shape)}; encode it with the --low-resolution of the network's data"
        )
    _, arrays = source.read(range(len(source)))
    told: dict[str, Tensor] = {}
    for each, one in conditions.items():
        if all(array in arrays for array in one.facts.arrays):
            told |= undropped(each, one).drop(arrays, 0, 0, 0)
    return told
