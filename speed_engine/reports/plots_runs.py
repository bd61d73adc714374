"""Several runs in one picture: loss, error by time step, validation loss, and their step tables side by side.

Each run is one line, named by its folder, and what differs between the runs (method, schedule, objective) stands behind
the name. Weighted losses of different methods are of different scale; the validation loss is what can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.reports import plots, plots_validation
from speed_engine.reports.style import alike, figure, line, log_scale


def names_of(runs: Sequence[Path]) -> list[str]:
    """A name for each: its folder's, with as many folders above as are needed to tell them apart.

    Raises ValueError for a run that is given twice.
    """
    places = [run.resolve() for run in runs]
    if twice := [run for run, place in zip(runs, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"--run {twice[0]} is given twice; give each run once")
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def labels_of(runs: Sequence[Path]) -> list[str]:
    """Names with what differs between the runs and the name does not say: `a (speed)`, `uniform`."""
    described = [plots.kinds_of(run) for run in runs]
    differing = [key for key in plots.KINDS if len({each.get(key) for each in described}) > 1]
    labels = []
    for name, each in zip(names_of(runs), described, strict=True):
        kinds = [each[key] for key in differing if key in each and each[key] not in name]
        labels.append(f"{name} ({', '.join(kinds)})" if kinds else name)
    return labels


def plot_runs(runs: Sequence[Path], out: Path, ending: str = "png") -> list[Path]:
    """Draw the runs together into the folder `out`; return the files that were written.

    What only some of them have measured is drawn of those. Raises ValueError as `plots.read_metrics` does.
    """
    labels = labels_of(runs)
    lines = {
        label: plots.read_metrics(run / "metrics.jsonl")
        for label, run in zip(labels, runs, strict=True)
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = [_losses(lines, out / f"loss.{ending}")]
    by_t = {name: rows for name, each in lines.items() if (rows := plots.rows_of(each))}
    if by_t:
        paths.append(_by_t(by_t, out / f"loss_by_t.{ending}"))
    judged = {
        name: found for name, each in lines.items() if (found := plots_validation.measured(each))
    }
    if judged:
        paths.append(_validation(judged, out / f"validation.{ending}"))
    return paths


def _losses(lines: Mapping[str, list[dict[str, Any]]], path: Path) -> Path:
    with figure(
        "Training loss", _subtitle(lines, "smoothed; weighted as each run was"), path
    ) as axes:
        positive = True
        for index, (name, each) in enumerate(lines.items()):
            steps = np.array([one["step"] for one in each])
            loss = np.array([one["loss"] for one in each])
            positive &= bool((loss > 0).all())
            window = max(1, round(plots.SMOOTHING * len(each)))
            axes.plot(steps, plots.smooth(loss, window), label=name, **line(index, len(lines)))
        _finish(axes, "loss, weighted (mean per element)", positive)
    return path


def _validation(lines: Mapping[str, list[dict[str, Any]]], path: Path) -> Path:
    subtitle = _subtitle(lines, "with two standard errors over samples")
    with figure("Validation loss", subtitle, path) as axes:
        curves = {}
        for index, (name, each) in enumerate(lines.items()):
            look = line(index, len(lines))
            steps = np.array([one["step"] for one in each])
            value = np.array([one["validation_loss"] for one in each])
            spread = np.array([one.get("validation_loss_se") or 0.0 for one in each])
            low, high = np.maximum(value - 2 * spread, 0.5 * value), value + 2 * spread
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.12, linewidth=0)
            axes.plot(steps, value, label=f"{name}: {value[-1]:.4g}", **look)
            curves[name] = value
        _finish(axes, "squared error of the noise, unweighted", True, alike(curves))
    return path


def _by_t(rows: Mapping[str, list[tuple[int, list[float]]]], path: Path) -> Path:
    subtitle = _subtitle(
        rows, f"mean over the last {plots.FINAL_SHARE:.0%} of each run's log lines"
    )
    with figure("Error by time step", subtitle, path) as axes:
        curves = {}
        for index, (name, kept) in enumerate(rows.items()):
            size = max(1, round(plots.FINAL_SHARE * len(kept)))
            late = np.ma.masked_invalid(np.array([row for _, row in kept[-size:]])).mean(0)
            centres = (np.arange(len(late)) + 0.5) / len(late)
            axes.plot(centres, late, label=name, **line(index, len(rows)))
            curves[name] = np.ma.filled(late, np.nan)
        _finish(axes, "squared error, unweighted (mean per element)", True, alike(curves))
        axes.set_xlim(0, 1)
        axes.set_xlabel("time step t / T   (0 = clean, 1 = noise)")
        axes.xaxis.set_major_formatter("{x:g}")
    return path


def _subtitle(lines: Mapping[str, Any], more: str) -> str:
    return f"{len(lines)} runs, {more}"


def _finish(axes: Any, label: str, positive: bool, groups: Sequence[Sequence[str]] = ()) -> None:
    if positive:
        log_scale(axes)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    on_each_other = "\n".join(f"on each other: {' = '.join(group)}" for group in groups)
    axes.legend(
        frameon=False, handlelength=4.5, fontsize=9, title=on_each_other or None, title_fontsize=8
    )
