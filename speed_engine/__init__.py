"""speed-engine: diffusion training on a step table. `from speed_engine import StepTable,
diffusion_loss` for foreign loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speed_engine.step_table import StepTable, diffusion_loss

__all__ = ["StepTable", "diffusion_loss"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from speed_engine import step_table  # on first use: importing the package imports no torch

        return getattr(step_table, name)
    raise AttributeError(f"module 'speed_engine' has no attribute {name!r}")
