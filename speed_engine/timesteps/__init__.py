"""Which time steps are drawn and what their loss counts: one file a method.

A method looks at a schedule and returns a `Method`: a density over its rows, a weight for each row
and, if it changes while training runs, an `Online` part that rewrites the two on the device. The
word `timesteps.kind` of a configuration is the name of a file of this folder; `combine` multiplies
several methods.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.kinds import Section, config_of
from speed_engine.schedules import Schedule
from speed_engine.timesteps.online import Online

# The loss that a weight was stated for: the objective's own target, or a fixed one from which it is
# converted.
WeightIn = Literal["own", "eps", "x0"]


class MethodConfig(Section):
    """What every time-step method can be told."""

    normalise: bool = Field(
        False, description="scale the weights to mean 1 under the density, E_P[w] = 1"
    )
    weight_vb: bool = Field(
        False, description="multiply the weight into the variational term too, not the MSE alone"
    )


MemberConfig = MethodConfig  # a file elsewhere is told these as well (see `kinds`)


@dataclass(frozen=True)
class Method:
    """A density over the rows of a schedule (float64 [T], sums to one) and a loss weight for each
    row (float64 [T]).

    `weight_in` names the loss that the weight belongs to, `tau` is the first row of the convergence
    area if the method has one, `resolved` is what the method decided (for the report). `online`
    changes the two columns while training runs. `parts` (of `combine`): densities, relative to
    uniform, and weights are multiplied.
    """

    density: Tensor
    weight: Tensor
    weight_in: WeightIn = "own"
    tau: int | None = None
    resolved: dict[str, object] = field(default_factory=dict)
    online: Online | None = None
    parts: tuple[Method, ...] = ()

    def own_weight(self, gain: Tensor, eps_gain: Tensor) -> Tensor:
        """The weight restated for the objective's own target; float64 [T].

        `gain` is d target / d x0, `eps_gain` alpha / sigma; float64 [T]. Raises ValueError where
        the result is not finite or negative.
        """
        weight = self.weight
        if self.weight_in == "eps":
            weight = weight * (eps_gain / gain).square()
        elif self.weight_in == "x0":
            weight = weight / gain.square()
        if not torch.isfinite(weight).all() or (weight < 0).any():
            raise ValueError(
                "the loss weights of this time-step method are not finite on this schedule and "
                "objective; choose another objective"
            )
        return weight

    @property
    def factors(self) -> tuple[Method, ...]:
        """The parts, or this method alone."""
        return self.parts or (self,)


def parse(
    value: Any, trusted: Collection[str] | None = None, place: int | None = None
) -> MethodConfig:
    """The configuration of a kind given by name or as a mapping with a `kind` (see `config_of`)."""
    config = config_of("timesteps", value, trusted, place)
    assert isinstance(config, MethodConfig)
    return config


def require_discrete(kind: str, schedule: Schedule) -> None:
    """Refuse continuous time, for methods that only exist for numbered steps. Raises ValueError."""
    if schedule.continuous:
        raise ValueError(
            f"timesteps.kind={kind} is defined for numbered steps, and schedule {schedule.kind} is "
            "continuous; choose a discrete schedule"
        )


def normalised(mass: Tensor, kind: str) -> Tensor:
    """`mass` scaled to sum to one; float64 [T]. Raises ValueError where that is impossible."""
    total = mass.double().sum()
    if not torch.isfinite(total) or total <= 0 or (mass < 0).any():
        raise ValueError(
            f"timesteps.kind={kind}: the density over the rows of this schedule is not positive "
            "and finite; change its location or width"
        )
    return mass.double() / total


def cell_mass(level: Tensor, cdf: Callable[[Tensor], Tensor], kind: str) -> Tensor:
    """Mass of a law in the cell around every row's `level` (float64 [T], rising); sums to one.

    A cell reaches half way to its neighbours, so a row has the levels nearest to it; the outermost
    cells are as wide outside as inside, and what lies beyond is not drawn. A level that is not
    finite (zero SNR) gets no mass. Raises ValueError where all mass lies beyond.
    """
    known = torch.isfinite(level)
    inner = level[known]
    middle = (inner[1:] + inner[:-1]) / 2
    edges = torch.cat([2 * inner[:1] - middle[:1], middle, 2 * inner[-1:] - middle[-1:]])
    mass = torch.zeros_like(level)
    mass[known] = cdf(edges).diff().clamp(min=0)
    return normalised(mass, kind)


def minmax(values: Tensor, whole: Tensor) -> Tensor:
    """`values` scaled by the map that takes `whole` linearly onto [0, 1], in [0, 1]; zeros where
    `whole` is all equal.
    """
    low, high = whole.min(), whole.max()
    if high == low:
        return torch.zeros_like(values)
    return ((values - low) / (high - low)).clamp(0, 1)


def integer_cdf(density_T: Tensor) -> Tensor:
    """cdf[j] = round(2^32 * sum_{i<=j} density_i) as int64 [T], the last exactly 2^32; no sync.

    Every row with a positive density keeps at least one of the 2^32 units, a row of density zero
    has none. The sums are over integers, so every device and every rank gets the same table.
    """
    units = (density_T.double() / density_T.double().sum() * 2**52).round().long()
    cumulative = units.cumsum(0)
    cdf = (cumulative.double() / cumulative[-1].double() * 2**32).round().long()
    positive = (density_T > 0).long().cumsum(0)
    # Strictly rising over the positive rows: raise what rounding merged, then make room at the end.
    cdf = (cdf - positive).clamp_min(0).cummax(0).values + positive
    return torch.minimum(cdf, 2**32 - (positive[-1] - positive))
