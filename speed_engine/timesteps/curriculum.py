"""One method, then another from a training step on, at once or over a ramp.

Curriculum Sampling (arXiv 2603.12517) draws logit-normal first and uniform at the end, because a
density that favours the middle starves the ends when details are learned; SpeeD may want the same
end. Before `at` finished steps the method `first` rules, from then on `then`; with `ramp` steps in
between the two objectives are mixed: with share s of `then` the density is
p = (1 - s) p1 + s p2 and the weight ((1 - s) p1 w1 + s p2 w2) / p, so that the expected loss is
(1 - s) of the one's plus s of the other's. A part that learns does so from the first step on, also
while the other one draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator
from torch import Tensor

from speed_engine.kinds import home, trusted_by
from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig, parse
from speed_engine.timesteps.online import Columns, Observations, Online
from speed_engine.timesteps.online.policy import Policy

MOST_MIXTURES = 100  # different tables of a ramp: it is a staircase of about so many steps


class Config(MethodConfig):
    """`timesteps.kind: curriculum`. `first` and `then` are kinds, or mappings with a `kind`."""

    kind: Literal["curriculum"] = "curriculum"
    first: SerializeAsAny[MethodConfig] = Field(description="the method that training begins with")
    then: SerializeAsAny[MethodConfig] = Field(description="the method that it ends with")
    at: int = Field(ge=1, description="finished training steps from which on `then` comes in")
    ramp: int = Field(0, ge=0, description="training steps of mixing from `at` on; 0 = at once")

    @field_validator("first", "then", mode="before")
    @classmethod
    def _parse(cls, value: object, info: ValidationInfo) -> MethodConfig:
        config = parse(value, trusted_by(info))
        where = f"timesteps.{info.field_name}"
        if config.normalise or config.weight_vb:
            raise ValueError(
                f"{where}: normalise and weight_vb have no effect here; set them beside first and then"
            )
        if getattr(config, "kind", "") == "combine":
            raise ValueError(
                f"{where} cannot be combine; list the curriculum among combine's parts instead"
            )
        return config


def build(config: Config, schedule: Schedule) -> Method:
    """Starts as `first`. Raises ValueError for a part that draws by itself."""
    first, then = (home(part).build(part, schedule) for part in (config.first, config.then))
    if any(isinstance(method.online, Policy) for method in (first, then)):
        raise ValueError(
            "timesteps.first and timesteps.then cannot be adaptive, which draws by itself; choose "
            "a method with a density"
        )
    switch = Curriculum(config, Side(first), Side(then))
    return replace(first, online=switch, resolved={**first.resolved, "at": config.at})


@dataclass
class Side:
    """One of the two methods; its present columns float64 [T] on the device."""

    method: Method
    density_T: Tensor = field(init=False)  # from `start` on
    weight_T: Tensor = field(init=False)

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        device = columns.density_T.device
        gain, eps_gain = columns.gain_T.cpu(), columns.eps_gain_T.cpu()
        self.density_T = self.method.density.to(device, copy=True)
        self.weight_T = self.method.own_weight(gain, eps_gain).to(device, copy=True)
        if self.method.online is not None:
            own = (self.density_T, self.weight_T, self.weight_T)
            named = dict(zip(("density_T", "weight_T", "total_weight_T"), own, strict=True))
            self.method.online.start(replace(columns, **named), shape)

    def learn(self, step: int, seen: Observations) -> None:
        if self.method.online is None:
            return
        density_T, weight_T = self.method.online.refresh(step, seen)
        if density_T is not None:
            self.density_T.copy_(density_T / density_T.sum())
        if weight_T is not None:
            self.weight_T.copy_(weight_T)

    def tensors(self) -> dict[str, Tensor]:
        online = self.method.online
        state = {} if online is None else online.tensors()
        return {"density": self.density_T, "weight": self.weight_T, **state}


class Curriculum(Online):
    """Both methods, and the share of the second, which the number of finished steps alone decides."""

    def __init__(self, config: Config, first: Side, then: Side) -> None:
        self.at, self.ramp = config.at, config.ramp
        self.first, self.then = first, then
        learning = [side.method.online for side in (first, then) if side.method.online is not None]
        # Every interval of a part, and the switch itself, falls on the end of one of ours.
        stairs = [max(1, self.ramp // MOST_MIXTURES)] if self.ramp else []
        self.every = math.gcd(self.at, *stairs, *(part.every for part in learning))
        self.needs_losses = any(part.needs_losses for part in learning)

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        for side in (self.first, self.then):
            side.start(columns, shape)

    def share(self, step: int) -> float:
        """Of `then`, after `step` finished steps; in [0, 1]."""
        if step < self.at:
            return 0.0
        return min(1.0, (step - self.at) / self.ramp) if self.ramp else 1.0

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        first, then = self.first, self.then
        for side in (first, then):
            side.learn(step, seen)
        share = self.share(step)
        if share in (0.0, 1.0):
            alone = then if share else first
            return alone.density_T, alone.weight_T
        one_T, two_T = (1 - share) * first.density_T, share * then.density_T
        density_T = one_T + two_T
        mass_T = one_T * first.weight_T + two_T * then.weight_T
        return density_T, mass_T / density_T.clamp_min(torch.finfo(torch.float64).tiny)

    def tensors(self) -> dict[str, Tensor]:
        sides = {"first": self.first, "then": self.then}
        return {
            f"{name}.{key}": value
            for name, side in sides.items()
            for key, value in side.tensors().items()
        }
