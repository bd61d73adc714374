"""Several methods at once: their densities, relative to uniform, are multiplied, and so are their
loss weights.

A re-weighting has a uniform density and a re-sampling weight one, so `parts: [log_normal, min_snr]`
draws like the first and weights like the second. SpeeD's suppression of EDM's noise levels is
`parts: [log_normal, {kind: speed_u, k: 5}]`. Methods that change while training keep changing.
`normalise` and `weight_vb` are this section's own; the parts' are not looked at.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from speed_engine.kinds import home, trusted_by
from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, normalised, parse
from speed_engine.timesteps.online.policy import Policy


class Config(MethodConfig):
    """`timesteps.kind: combine`. A part is a kind, or a mapping with a `kind` and its parameters."""

    kind: Literal["combine"] = "combine"
    parts: tuple[SerializeAsAny[MethodConfig], ...] = Field(description="the methods, at least one")

    @field_validator("parts", mode="before")
    @classmethod
    def _parse(cls, value: Any, info: ValidationInfo) -> tuple[MethodConfig, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(
                "timesteps.parts must list the methods to combine, such as [speed, p2]"
            )
        parts = tuple(parse(part, trusted_by(info), number) for number, part in enumerate(value))
        for part in parts:
            if isinstance(part, Config):
                raise ValueError(
                    "timesteps.parts holds another combine; list its parts here instead"
                )
            if part.normalise or part.weight_vb:
                raise ValueError(
                    "timesteps.parts: normalise and weight_vb have no effect in a part; set them beside parts"
                    " (and in a part that has them by default: weight_vb: false)"
                )
        return parts


def build(config: Config, schedule: Schedule) -> Method:
    """The product; the threshold, for the report, is the first that a part has."""
    parts = tuple(home(part).build(part, schedule) for part in config.parts)
    draws = any(isinstance(part.online, Policy) for part in parts)
    if draws and sum(not torch.equal(part.density, schedule.uniform) for part in parts):
        raise ValueError(
            "timesteps.parts: adaptive draws by itself, so the other parts may only re-weight; "
            "take the re-sampling ones out"
        )
    relative = torch.stack([part.density / schedule.uniform for part in parts]).prod(dim=0)
    density = normalised(relative * schedule.uniform, config.kind)
    tau = next((part.tau for part in parts if part.tau is not None), None)
    resolved = {name: value for part in reversed(parts) for name, value in part.resolved.items()}
    return Method(density, torch.ones_like(density), tau=tau, resolved=resolved, parts=parts)
