"""EDM's noise levels (Karras et al. 2022): x = x0 + sigma eps on the range that its sampler visits.

The coordinate is ln sigma, so `timesteps: uniform` is uniform in ln sigma; EDM itself draws with
`timesteps: edm` or `log_normal`, whose tails outside the range (1e-5 of the mass) are cut off. time
is c_noise = ln(sigma) / 4.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from speed_engine.kinds import Section
from speed_engine.schedules import NUM_CELLS, Schedule
from speed_engine.schedules.ve import sigma_schedule


class Config(Section):
    """`schedule.kind: edm`."""

    kind: Literal["edm"] = "edm"
    sigma_min: float = Field(0.002, gt=0, description="smallest noise level")
    sigma_max: float = Field(80.0, gt=0, description="largest noise level")
    sigma_data: float = Field(0.5, gt=0, description="standard deviation of x0")
    num_cells: int = Field(NUM_CELLS, ge=16, le=2**20, description="rows of the table")


def build(config: Config) -> Schedule:
    """Rows at the middles of equal cells of ln sigma. Raises ValueError for an empty range."""
    return sigma_schedule(
        "edm", config.sigma_min, config.sigma_max, config.sigma_data, config.num_cells
    )
