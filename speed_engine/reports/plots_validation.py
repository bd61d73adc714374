"""Pictures of the validation loss: the curve, and the error by log-SNR over the run.

`validation.png`: the scalar with a band of two standard errors. `validation_by_log_snr.png`: a heat map, bins against
steps, of the error of the noise as a share of its own last value, so that every bin shows when it was learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.reports.style import BLUE, figure, log_scale, write_value


def measured(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that hold a validation loss."""
    return [line for line in lines if isinstance(line.get("validation_loss"), float)]


def by_log_snr(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of them that hold the errors of the bins."""
    return [line for line in lines if isinstance(line.get("validation_by_log_snr"), dict)]


def plot_validation(lines: list[dict[str, Any]], subtitle: str, path: Path) -> Path:
    """The validation loss against the step, logarithmic, with two standard errors on both sides."""
    steps = np.array([line["step"] for line in lines])
    value = np.array([line["validation_loss"] for line in lines])
    spread = np.array([line.get("validation_loss_se") or 0.0 for line in lines])
    with figure("Validation loss", subtitle, path) as axes:
        low, high = np.maximum(value - 2 * spread, 0.5 * value), value + 2 * spread
        label = "two standard errors over samples"
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, linewidth=0, label=label)
        axes.plot(steps, value, color=BLUE, linewidth=2.2, marker="o", ms=4)
        write_value(axes, steps[-1], value[-1])
        log_scale(axes)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(0, steps[-1])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("squared error of the noise, unweighted")
        axes.legend(frameon=False)
    return path


def plot_by_log_snr(lines: list[dict[str, Any]], subtitle: str, path: Path) -> Path:
    """Error of the noise by log-SNR (up) and step (across), over the bin's last value; empty bins stay white."""
    kept = by_log_snr(lines)
    edges = np.array(kept[-1]["validation_by_log_snr"]["edges"])
    table = np.array([line["validation_by_log_snr"]["eps"] for line in kept], dtype=float)
    filled = np.flatnonzero(np.isfinite(table[-1]))
    first, last = filled[0], filled[-1] + 1
    ratio = np.ma.masked_invalid(np.log2(table / table[-1]))
    steps = np.array([line["step"] for line in kept], dtype=float)
    sides = np.concatenate([[0.0], (steps[1:] + steps[:-1]) / 2, [steps[-1]]])
    with figure("Error by log-SNR", subtitle, path) as axes:
        axes.grid(False)
        bins = edges[first : last + 1]
        most = max(0.5, float(np.ma.max(ratio)))
        mesh = axes.pcolormesh(
            sides, bins, ratio.T[first:last], cmap="RdBu_r", vmin=-most, vmax=most
        )
        ticks = list(range(-int(most), int(most) + 1))
        bar = axes.figure.colorbar(mesh, ax=axes, ticks=ticks)
        bar.ax.set_yticklabels([f"{2.0**tick:g}x" for tick in ticks])
        bar.set_label("error of the noise, over its last value")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("ln SNR   (clean above, noise below)")
    return path
