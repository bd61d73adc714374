"""Rectified flow x = (1 - t) x0 + t eps in continuous time (Liu et al. 2023; Esser et al. 2024 for
the shift).

u = t^2 / (t^2 + (1 - t)^2) rises fastest at t = 1/2 (rate 2) and reaches 1 - 1/r at sqrt(r-1) / (1
+ sqrt(r-1)). `shift` s moves the times towards noise for large images, t' = s t / (1 + (s - 1) t);
densities over t are before the shift. `auto` is the dimension shift of latents with many channels,
s = sqrt(C H W / 4096), from the shape of a sample (Zheng et al. 2025, RAE).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from speed_engine.kinds import Section
from speed_engine.schedules import NUM_CELLS, Schedule, cells, flow_curve, on_curve


class Config(Section):
    """`schedule.kind: rectified_flow`."""

    kind: Literal["rectified_flow"] = "rectified_flow"
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1.0, description="resolution shift; 3 for SD3 at 1024 pixels; auto: sqrt(C H W / 4096)"
    )
    time_scale: float = Field(1000.0, gt=0, description="the network is told time_scale * t'")
    num_cells: int = Field(NUM_CELLS, ge=16, le=2**20, description="rows of the table")

    def for_shape(self, shape: tuple[int, ...]) -> Config:
        """The same with `auto` as a number, for samples of `shape` [C, *space]."""
        if self.shift != "auto":
            return self
        return self.model_copy(update={"shift": math.sqrt(math.prod(shape) / 4096)})


def build(config: Config) -> Schedule:
    """Rows at the middles of equal cells of t. Raises ValueError while the shift is `auto`."""
    if config.shift == "auto":
        raise ValueError(
            "schedule.shift=auto is known once the data's shape is; give the number itself, "
            "sqrt(C H W / 4096)"
        )
    curve = flow_curve(config.shift, config.time_scale)
    return on_curve("rectified_flow", curve, *cells(0.0, 1.0, config.num_cells))
