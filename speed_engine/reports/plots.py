"""Pictures of a run's progress, drawn from its `metrics.jsonl`.

`loss.png`: the loss against the step, raw and smoothed. `loss_by_t.png`: the unweighted error in
each part of the time steps, at the end of the run. Drawn with matplotlib's Agg backend through its
object interface, so no display and no global state is needed. The pictures of P(t), w(t) and the
increments are the business of plots_table.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.reports import plots_validation
from speed_engine.reports.style import BLUE, GREY, figure, log_scale, write_value
from speed_engine.training import metrics_file, sealed

SMOOTHING = 0.02  # the smoothed curve's window, as a share of the lines
KINDS = ("timesteps", "schedule", "objective")
FINAL_SHARE = 0.2  # the share of the lines behind each curve of loss_by_t.png


def plot_run(run: Path, out: Path, ending: str = "png") -> list[Path]:
    """Draw what `run/metrics.jsonl` holds into the folder `out`; return the files that were
    written, in the format `ending`.

    A run without `loss_by_t` gets no `loss_by_t.png`. Raises ValueError if there is no line to
    draw.
    """
    lines = read_metrics(run / "metrics.jsonl")
    subtitle = describe(run)
    out.mkdir(parents=True, exist_ok=True)
    paths = [plot_loss(lines, subtitle, out / f"loss.{ending}")]
    if any(buckets(line) is not None for line in lines):
        paths.append(plot_loss_by_t(lines, subtitle, out / f"loss_by_t.{ending}"))
    if judged := plots_validation.measured(lines):
        path = out / f"validation.{ending}"
        paths.append(plots_validation.plot_validation(judged, subtitle, path))
        if plots_validation.by_log_snr(judged):
            path = out / f"validation_by_log_snr.{ending}"
            paths.append(plots_validation.plot_by_log_snr(judged, subtitle, path))
    return paths


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl with a step and a finite loss, in the order of steps.

    Other keys are kept as they are. Raises ValueError as `metrics_file.read` does, and where nothing
    is left.
    """
    lines = [line for line in metrics_file.read(path) if _finite(line.get("loss"))]
    if not lines:
        raise ValueError(f"{path} holds no line with a step and a finite loss yet; train longer")
    return lines


def kinds_of(run: Path) -> dict[str, str]:
    """Method, schedule and objective by section; nothing where the manifest does not tell."""
    try:
        config = sealed.read(run / "manifest.json")["config"]
        return {key: str(config[key]["kind"]) for key in KINDS}
    except (OSError, ValueError, KeyError, TypeError):  # the pictures do not depend on it
        return {}


def describe(run: Path) -> str:
    """The run's name and, where its manifest tells, method, schedule and objective."""
    return ", ".join(
        [run.resolve().name, *(f"{key} {kind}" for key, kind in kinds_of(run).items())]
    )


def rows_of(lines: list[dict[str, Any]]) -> list[tuple[int, list[float]]]:
    """(step, error in each part of the time steps) of the lines that have as many parts as the last one."""
    kept = [(line["step"], row) for line in lines if (row := buckets(line)) is not None]
    return [(step, row) for step, row in kept if len(row) == len(kept[-1][1])]


def plot_loss(lines: list[dict[str, Any]], subtitle: str, path: Path) -> Path:
    """Loss against step on a logarithmic axis: every line faint, the smoothed curve on top."""
    steps = np.array([line["step"] for line in lines])
    loss = np.array([line["loss"] for line in lines])
    window = max(1, round(SMOOTHING * len(lines)))
    smoothed = smooth(loss, window)
    with figure("Training loss", subtitle, path) as axes:
        marker = "o" if len(lines) < 30 else None  # a few points are not read from a line alone
        axes.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=1, marker=marker, label="as logged")
        axes.plot(steps, smoothed, color=BLUE, linewidth=2.2, label=f"mean of {window} log lines")
        write_value(axes, steps[-1], smoothed[-1])
        if (loss > 0).all():
            log_scale(axes)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, weighted (mean per element)")
        if window > 1:
            axes.legend(frameon=False)
    return path


def plot_loss_by_t(lines: list[dict[str, Any]], subtitle: str, path: Path) -> Path:
    """The unweighted error in each bucket of time steps, early and late in the run.

    Each curve is the mean over FINAL_SHARE of the lines; the band of the late one holds the middle
    80 % of its lines. Raises ValueError where no line has buckets.
    """
    kept = rows_of(lines)
    if not kept:
        raise ValueError("no line of the metrics has loss_by_t; it cannot be drawn")
    size = max(1, round(FINAL_SHARE * len(kept)))
    centres = (np.arange(len(kept[-1][1])) + 0.5) / len(kept[-1][1])
    with figure("Error by time step", subtitle, path) as axes:
        if len(kept) >= 2 * size and len(kept) > 1:
            early = _columns(kept[:size])
            label = f"{_span(kept[:size])}, mean"
            axes.plot(
                centres, early.mean(0), color=GREY, linewidth=1.6, marker="o", ms=4, label=label
            )
        late = _columns(kept[-size:])
        label = f"{_span(kept[-size:])}, mean" + (" and middle 80 %" if size > 4 else "")
        low, high = (np.ma.masked_invalid(_quantile(late, q)) for q in (0.1, 0.9))
        axes.fill_between(centres, low, high, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(centres, late.mean(0), color=BLUE, linewidth=2.2, marker="o", ms=5, label=label)
        if (late > 0).any():
            log_scale(axes)
        axes.set_xlim(0, 1)
        axes.set_xlabel("time step t / T   (0 = clean, 1 = noise)")
        axes.set_ylabel("squared error, unweighted (mean per element)")
        axes.legend(frameon=False)
    return path


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each one, fewer at the ends; same length."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    low = np.maximum(centre - window // 2, 0)
    high = np.minimum(centre + (window + 1) // 2, len(values))
    return (total[high] - total[low]) / (high - low)


def _finite(value: Any) -> bool:
    """Whether `value` is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)


def buckets(line: dict[str, Any]) -> list[float] | None:
    """The line's `loss_by_t` with NaN for empty buckets, None if it has none at all."""
    row = line.get("loss_by_t")
    if not isinstance(row, list) or not any(_finite(value) for value in row):
        return None
    return [float(value) if _finite(value) else math.nan for value in row]


def _columns(rows: list[tuple[int, list[float]]]) -> np.ma.MaskedArray:
    """Buckets of several lines, [lines, buckets], with the empty ones masked."""
    return np.ma.masked_invalid(np.array([row for _, row in rows]))


def _quantile(table: np.ma.MaskedArray, q: float) -> np.ndarray:
    """The q-quantile of each column over its unmasked entries; NaN where there is none."""
    columns = [column.compressed() for column in table.T]
    return np.array([np.quantile(c, q) if len(c) else math.nan for c in columns])


def _span(rows: list[tuple[int, list[float]]]) -> str:
    """The steps of some lines, in words."""
    first, last = rows[0][0], rows[-1][0]
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
