"""Classifier-free guidance: the network told and untold, in one call (Ho and Salimans, arXiv 2207.12598)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from speed_engine.conditions import Condition

# (x [B, C, *space], time float32 [B], **conditions) -> [B, C or 2C, *space]; an nn.Module in eval mode
Model = Callable[..., Tensor]


def scale_at(place: float, guidance: float, power: float) -> float:
    """The w of `guided` at a level, by the power cosine of MDT (Gao et al., arXiv 2303.14389).

    It grows from 1, which is no guidance, at pure noise to `guidance` at the data, the later the higher the power:
    1 + (guidance - 1) (1 - cos(pi (1 - place)^power)) / 2; at power 0 it is `guidance` everywhere. place: of the level
    in the schedule, in [0, 1] (`grid.Levels`).
    """
    if power == 0:
        return guidance
    return 1 + (guidance - 1) * (1 - math.cos(math.pi * (1 - place) ** power)) / 2


def guided(out_told: Tensor, out_null: Tensor, guidance: float, num_guided: int) -> Tensor:
    """null + w (told - null) on the first `num_guided` channels.

    The other channels (the learned variance, and what `guidance_channels` leaves out) keep what the
    told network says.
    """
    c, n = out_told[:, :num_guided], out_null[:, :num_guided]
    return torch.cat([n + guidance * (c - n), out_told[:, num_guided:]], dim=1)


def nulls(
    conditions: Mapping[str, Condition], batch: int, device: torch.device
) -> dict[str, Tensor]:
    """The network's keywords for "none" of every condition that has one."""
    found: dict[str, Tensor] = {}
    for condition in conditions.values():
        if condition.facts.null:
            found |= condition.null(batch, device)
    return found


def completed(
    conditions: Mapping[str, Condition],
    given: Mapping[str, Tensor],
    batch: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """`given` (keywords [batch, ...]), and "none" for what is not. Raises ValueError for what is not known, or has no
    "none".
    """
    null = nulls(conditions, batch, device)
    must = [name for name, each in conditions.items() if not each.facts.null]
    missing = [name for name in must if name not in given]
    # A condition may have several keywords, which begin with its name.
    known = [*null, *(word for word in given for name in must if word.startswith(f"{name}_"))]
    unknown = [name for name in given if name not in known and name not in must]
    if unknown and not conditions:
        raise ValueError(f"this model is unconditional; leave {unknown[0]} out")
    if unknown and not missing:
        there = ", ".join([*null, *must])
        raise ValueError(f"this model is not told {unknown[0]}; it is told {there}")
    if missing and not unknown:
        raise ValueError(f"this model has no null {missing[0]}; say which {missing[0]} it is told")
    return {**null, **given}


def evaluate(
    model: Model,
    x: Tensor,
    time: float,
    told: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    guidance: float,
    guidance_channels: int | Literal["all"],
    channels: int,
) -> Tensor:
    """The network's (guided) output in float32 or float64.

    told: its keywords [B, ...]. null: those of them that guidance leads away from; a condition
    without a "none" stays as told on both sides.
    """
    batch, doubled = len(x), guidance != 1
    if doubled:  # one call on [x, x] is faster than two calls
        x = torch.cat([x, x])
        told = {name: torch.cat([value, null.get(name, value)]) for name, value in told.items()}
    time_B = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
    out = model(x, time_B, **told)
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    if doubled:
        num = channels if guidance_channels == "all" else guidance_channels
        out = guided(out[:batch], out[batch:], guidance, num)
    return out
