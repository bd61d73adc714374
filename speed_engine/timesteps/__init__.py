"""Which time steps are drawn and what their loss counts: one file a method, all of them become one
`Method`.

A method looks at a schedule and returns a density over its rows and a weight for each row. Adaptive
ones also carry a `Refresher` that rewrites those two columns on the device while training runs. The
word `timesteps.kind` of a configuration is the name of a file of this folder; `combine` takes the
density of one and the weight of another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

# The loss that a weight was stated for: the objective's own target, or a fixed one from which it is
# converted.
WeightIn = Literal["own", "eps", "x0"]


def names() -> list[str]:
    """Every `timesteps.kind` that exists: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem[0] != "_")


class MethodConfig(BaseModel):
    """What every time-step method can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    normalise: bool = Field(
        False, description="scale the weights to mean 1 under the density, E_P[w] = 1"
    )
    weight_vb: bool = Field(
        False, description="multiply the weight into the variational term too, not the MSE alone"
    )


@dataclass(frozen=True)
class Method:
    """A density over the rows of a schedule (float64 [T], sums to one) and a loss weight for each
    row (float64 [T]).

    `weight_in` names the loss that the weight belongs to. `resolved` is what the method decided
    (for the report), `tau` the first row of the convergence area if the method has one.
    """

    density: Tensor
    weight: Tensor
    weight_in: WeightIn = "own"
    tau: int | None = None
    resolved: dict[str, object] = field(default_factory=dict)


def normalised(mass: Tensor, kind: str) -> Tensor:
    """`mass` scaled to sum to one; float64 [T]. Raises ValueError where that is impossible."""
    total = mass.double().sum()
    if not torch.isfinite(total) or total <= 0 or (mass < 0).any():
        raise ValueError(
            f"timesteps.kind={kind}: the density over the rows of this schedule is not positive "
            "and finite; change its location or width"
        )
    return mass.double() / total


def minmax(values: Tensor) -> Tensor:
    """`values` scaled linearly onto [0, 1]; zeros where they are all equal."""
    low, high = values.min(), values.max()
    if high == low:
        return torch.zeros_like(values)
    return (values - low) / (high - low)
