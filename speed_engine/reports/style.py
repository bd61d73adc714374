"""The one look of all pictures: inks, the colours of lines in their order, and how a figure becomes a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speed_engine.atomic_files import atomic

INK, GREY, GRID, BLUE = "#222222", "#7a7a7a", "#e2e2e2", "#1f5fa8"
LINES = (BLUE, "#c44e22", "#3a8a4f", "#7a4fa3", "#a8861a", "#3a9ea5", "#b03a6f", "#555555")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save(figure: Any, path: Path, dpi: int = 150) -> Path:
    """Write a figure in the format that the path's ending names (PNG without one), whole or not at all."""
    with atomic(path) as partial, partial.open("wb") as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=dpi)
    return path
