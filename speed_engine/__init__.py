"""speed-engine: diffusion training on a step table.

For somebody else's training loop: `from speed_engine import StepTable, diffusion_loss`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speed_engine.diffusion_step import diffusion_loss
    from speed_engine.step_table import StepTable

__all__ = ["StepTable", "__version__", "diffusion_loss"]

__version__ = "0.1.0"  # the one place; the package's metadata is made from it


def __getattr__(name: str) -> Any:
    # On first use, so that importing the package imports no torch.
    if name == "StepTable":
        from speed_engine.step_table import StepTable

        return StepTable
    if name == "diffusion_loss":
        from speed_engine.diffusion_step import diffusion_loss

        return diffusion_loss
    raise AttributeError(f"module 'speed_engine' has no attribute {name!r}")
