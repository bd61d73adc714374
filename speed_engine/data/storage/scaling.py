"""The constants of x = (stored - shift) * scale, of latents: as a person gave them, or as they were measured."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np

from .. import DataError

Numbers: TypeAlias = float | tuple[float, ...]  # one of all channels, or one a channel
Scale: TypeAlias = Numbers | Literal["auto"]


def check(scale: Scale | None, shift: Scale | None, channels: int) -> None:
    """Raise DataError for constants that latents of so many channels cannot have; before the work is done."""
    if scale is None:
        raise DataError(
            "the scale of these latents is unknown; give --scale (0.18215 for Stable Diffusion's "
            "VAE, 1 for latents that are scaled already, auto to measure it)"
        )
    if shift == "auto" or (scale == "auto" and shift is not None):
        raise DataError("--scale auto measures scale and shift of every channel; leave out --shift")
    for name, given in (("scale", scale), ("shift", shift)):
        if given is None or isinstance(given, str):
            continue
        numbers = given if isinstance(given, tuple) else (given,)
        if len(numbers) not in (1, channels):
            raise DataError(
                f"--{name} has {len(numbers)} numbers for {channels} channels; give one or all"
            )
        if not all(map(math.isfinite, numbers)) or (name == "scale" and min(numbers) <= 0):
            raise DataError(
                f"--{name} {given} must be finite{' and above 0' if name == 'scale' else ''}"
            )


def constants(
    scale: Scale | None, shift: Scale | None, mean: np.ndarray, var: np.ndarray
) -> tuple[Numbers, Numbers]:
    """(scale, shift) of latents with this measured mean and variance, [C], in stored units.

    scale "auto": every channel to mean 0 and deviation 1. Raises DataError.
    """
    check(scale, shift, len(mean))
    if scale == "auto":
        if not (var > 0).all():
            raise DataError(
                f"--scale auto needs channels that vary, and channel {int(np.argmin(var))} is "
                "constant; give numbers"
            )
        return tuple((1 / np.sqrt(var)).tolist()), tuple(mean.tolist())
    assert scale is not None and not isinstance(shift, str)  # by `check`
    return _plain(scale), _plain(0.0 if shift is None else shift)


def _plain(numbers: Numbers) -> Numbers:
    """One number where there is but one."""
    return numbers[0] if isinstance(numbers, tuple) and len(numbers) == 1 else numbers
