"""The one look of all pictures: inks, the colours of lines in their order, and how a figure becomes a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
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


def log_scale(axes: Any) -> None:
    """A logarithmic y axis that is labelled with plain numbers, also within one decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    digits = (1.0,) if decades > 4 else (1.0, 2.0, 5.0)
    narrow = decades < 0.8  # 1, 2, 5 would leave the axis almost bare
    axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=digits))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def write_value(axes: Any, x: float, y: float) -> None:
    """The last value of a curve, beside its end."""
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(f"{y:.3g}", (x, y), color=BLUE, fontweight="bold", annotation_clip=False, **place)


@contextmanager
def figure(title: str, subtitle: str, path: Path) -> Iterator[Any]:
    """Axes to draw in; written to `path` as a PNG at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(8, 4.8), layout="constrained")
        axes = drawn.add_subplot()
        axes.grid(True, which="major", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(title, fontsize=14, fontweight="bold", loc="left", pad=26)
        place = {"xytext": (0, 9), "textcoords": "offset points", "va": "bottom"}
        axes.annotate(subtitle, (0, 1), xycoords="axes fraction", fontsize=10, color=GREY, **place)
        yield axes
        save(drawn, path)
