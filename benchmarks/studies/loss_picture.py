"""The picture of loss_curves: the smoothed curves above, their differences to the first one below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from speed_engine.atomic_files import atomic
from speed_engine.reports.plots import smooth
from speed_engine.reports.style import GREY, GRID, INK, LINES, STYLE

COLOURS = (INK, *LINES)
WINDOW = 0.02  # of the smoothing, as a share of the steps


def draw(key: str, curves: Mapping[str, Sequence[float]], run: str, path: Path) -> Path:
    """`curves`: value of the setting `key` -> the loss of every step, equally many of each. -> path.

    A value that is not finite, and the steps whose window holds it, leave a gap.
    """
    import matplotlib
    from matplotlib.figure import Figure

    losses = {value: np.array(list(curve), np.float64) for value, curve in curves.items()}
    first, base = next(iter(losses.items()))
    steps = np.arange(1, len(base) + 1)
    window = max(1, round(WINDOW * len(base)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 6.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for number, (value, loss) in enumerate(losses.items()):
            colour = COLOURS[number % len(COLOURS)]
            # Later curves are thinner, so that equal ones are both seen.
            width = max(1.0, 3.2 - 1.4 * number)
            above.plot(steps, smoothed(loss, window), color=colour, linewidth=width, label=value)
            if number:
                difference = loss - base
                below.plot(steps, difference, color=colour, alpha=0.2, linewidth=0.8)
                below.plot(steps, smoothed(difference, window), color=colour, linewidth=1.8)
        above.set_yscale("log" if all((loss > 0).all() for loss in losses.values()) else "linear")
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("{x:g}")
        above.set_ylabel("loss (mean per element)")
        above.legend(frameon=False, title=key)
        above.set_title(f"{run}: {key}", fontsize=14, fontweight="bold", loc="left")
        below.axhline(0.0, color=GREY, linewidth=1)
        below.set_ylabel(f"loss minus that of {first}")
        below.set_xlabel(f"optimizer step (thick: mean of {window} steps)")
        below.xaxis.set_major_formatter("{x:,.0f}")
        below.set_xlim(1, max(2, len(base)))
        for axes in (above, below):
            axes.grid(True, which="major", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
        with atomic(path) as partial, partial.open("wb") as file:
            figure.savefig(file, format="png", dpi=150)
    return path


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """`plots.smooth`, with gaps only where the window holds a value that is not finite."""
    good = np.isfinite(values)
    mean = smooth(np.where(good, values, 0.0), window)
    return np.where(smooth((~good).astype(np.float64), window) > 0, np.nan, mean)
