"""Matrices in e4m3, eight bits a number, with float32 scales: values * scale.

e4m3 has three bits of mantissa and ends at 448, so a scale is the largest magnitude of what shares it over 448. Values
are multiplied by its inverse, one rounding more than a division by it and many times cheaper on a GPU. Where an op
writes such rows itself, they are these, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Scaling = Literal["tensor", "row"]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# The scale of what is zero, or nearly: a normal number whose inverse is finite.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Scaled(NamedTuple):
    """The matrix values_RC * scale: values in e4m3, row-major; scale in float32, [R, 1] or []."""

    values: Tensor
    scale: Tensor


def quantise(x_RC: Tensor, scaling: Scaling) -> Scaled:
    """`x_RC` (any float dtype, any strides, not empty) in e4m3, rounded to nearest even.

    scale = max|x| / 448, over the whole matrix or over each row; never zero. A NaN or an infinity
    makes its scale, and with it all that shares it, not finite: no fault is hidden.
    """
    along: dict[str, Any] = {"dim": 1, "keepdim": True} if scaling == "row" else {}
    amax = torch.linalg.vector_norm(
        x_RC, math.inf, **along
    )  # abs().amax() would write the magnitudes
    scale = (amax.float() / LARGEST).clamp(min=SMALLEST_SCALE)  # clamp hands NaN on
    # In float32, which the scale of one dimension or more makes it: rounding twice is further from the truth.
    values = x_RC * scale.reciprocal().reshape(-1, 1)
    return Scaled(values.to(E4M3).contiguous(), scale)


def unavailable(device: torch.device) -> str | None:
    """Why a Triton kernel cannot write e4m3 on `device`, or None. (On the CPU kernels are interpreted.)"""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"e4m3 needs a GPU of compute capability 8.9 or newer, and {torch.cuda.get_device_name(device)} has "
        f"{major}.{minor}; choose model.products=native"
    )
