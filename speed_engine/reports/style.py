"""The one look of all pictures: inks, how lines are told apart, and how a figure becomes a file.

Lines differ in colour and in dashes, so that they are told apart in grey, too; later ones are thinner, so that one that
lies on another shows it through its gaps and at its sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from speed_engine.atomic_files import atomic

INK, GREY, GRID, BLUE = "#222222", "#7a7a7a", "#e2e2e2", "#1f5fa8"
LINES = (BLUE, "#c44e22", "#3a8a4f", "#7a4fa3", "#a8861a", "#3a9ea5", "#b03a6f", "#555555")
Dash = Literal["solid"] | tuple[float, tuple[float, ...]]
DASHES: tuple[Dash, ...] = (
    "solid",
    (0, (6, 2)),
    (0, (1.5, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (3, 3)),
    (0, (7, 1.5, 1.5, 1.5, 1.5, 1.5)),
    (0, (11, 4)),
    (0, (1.5, 4)),
)
WIDEST, THINNEST = 3.0, 1.4  # of lines in one picture, in points
ENDINGS = ("png", "pdf", "svg")
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


def line(index: int, num: int) -> dict[str, Any]:
    """How line `index` of `num` in a picture is drawn: colour, dashes, width, and above the ones before it."""
    turn = index // len(LINES)  # after eight colours the dashes move on
    width = WIDEST - (WIDEST - THINNEST) * index / max(num - 1, 1) if num > 1 else 2.2
    return {
        "color": LINES[index % len(LINES)],
        "linestyle": DASHES[(index + turn) % len(DASHES)],
        "linewidth": width,
        "zorder": 2 + index / 100,
    }


def alike(curves: Mapping[str, np.ndarray]) -> list[list[str]]:
    """The names of curves [...] that lie on each other to half a per cent, as groups of two and more."""
    groups: list[list[str]] = []
    for name, curve in curves.items():
        for group in groups:
            first = curves[group[0]]
            if first.shape == curve.shape and np.allclose(first, curve, rtol=5e-3, equal_nan=True):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def save(figure: Any, path: Path, dpi: int = 150) -> Path:
    """Write a figure in the format that the path's ending names (PNG without one), whole or not at all.

    Letters stay letters, as publishers want them; the same numbers give the same file.
    """
    import matplotlib

    ending = path.suffix[1:] or "png"
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(ending)
    letters = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "speed-engine"}
    with matplotlib.rc_context(letters), atomic(path) as partial, partial.open("wb") as file:  # type: ignore[arg-type]
        figure.savefig(file, format=ending, dpi=dpi, metadata=undated)
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
    """Axes to draw in; written to `path` at the end."""
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
