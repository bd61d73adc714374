"""Pictures of a run's progress, drawn from its `metrics.jsonl`.

`loss.png`: the loss against the step, raw and smoothed. `loss_by_t.png`: the unweighted error in each part of the
time steps, at the end of the run. Drawn with matplotlib's Agg backend through its object interface, so no display
and no global state is needed. The pictures of P(t), w(t) and the increments are the business of plots_table.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.sample_folder import atomic

INK, GRID, BLUE, ORANGE = "#222222", "#dddddd", "#1f5fa8", "#d9730d"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SMOOTHING = 0.02  # the smoothed curve's window, as a share of the run
FINAL_SHARE = 0.2  # the last part of the run that loss_by_t.png averages over


def plot_run(run: Path, out: Path) -> list[Path]:
    """Draw what `run/metrics.jsonl` holds into the folder `out`; return the files that were written.

    A run without `loss_by_t` gets no `loss_by_t.png`. Raises ValueError if there is no line to draw.
    """
    lines = read_metrics(run / "metrics.jsonl")
    title = describe(run)
    out.mkdir(parents=True, exist_ok=True)
    paths = [plot_loss(lines, title, out / "loss.png")]
    if any(_buckets(line) is not None for line in lines):
        paths.append(plot_loss_by_t(lines, title, out / "loss_by_t.png"))
    return paths


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl with a step and a finite loss, in the order of steps.

    Other keys are kept as they are. A broken last line (a killed run) is passed over; of a step that was written
    twice (a resumed run) the later line counts. Raises ValueError for a missing file, a broken line elsewhere, and
    where nothing is left.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing; give the folder of a run that has started training")
    text = path.read_text(encoding="utf-8").splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for number, raw in enumerate(text, start=1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
        except ValueError as error:
            if number == len(text):
                break
            raise ValueError(f"{path}, line {number} is not JSON; remove that line") from error
        if (
            isinstance(line, dict)
            and isinstance(line.get("step"), int)
            and _finite(line.get("loss"))
        ):
            by_step[line["step"]] = line
    if not by_step:
        raise ValueError(f"{path} holds no line with a step and a finite loss yet; train longer")
    return [by_step[step] for step in sorted(by_step)]


def describe(run: Path) -> str:
    """What the pictures are headed with: preset-like facts from config.yaml or manifest.json, else the name."""
    return run.resolve().name


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each one, fewer at the ends; same length."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    low = np.maximum(centre - window // 2, 0)
    high = np.minimum(centre + (window + 1) // 2, len(values))
    high = np.maximum(high, low + 1)
    return (total[high] - total[low]) / (high - low)


def plot_loss(lines: list[dict[str, Any]], title: str, path: Path) -> Path:
    """Loss against step on a logarithmic axis: every line faint, the smoothed curve on top."""
    steps = np.array([line["step"] for line in lines])
    loss = np.array([line["loss"] for line in lines])
    window = max(1, round(SMOOTHING * len(lines)))
    figure, axes = _figure()
    few = len(lines) < 30  # too few points for a curve to be read from a line alone
    axes.plot(steps, loss, color=BLUE, alpha=0.3, linewidth=0.8, marker="o" if few else None)
    smoothed = smooth(loss, window)
    label = f"mean of {window} lines" if window > 1 else "loss"
    axes.plot(steps, smoothed, color=BLUE, linewidth=2, label=label)
    axes.annotate(
        f"{smoothed[-1]:.4g}",
        (steps[-1], smoothed[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=BLUE,
        fontweight="bold",
    )
    if (loss > 0).all():
        axes.set_yscale("log")
    axes.set_xlim(steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (weighted)")
    axes.set_title(f"Loss, {title}")
    if window > 1:
        axes.legend(frameon=False)
    return _save(figure, path)


def plot_loss_by_t(lines: list[dict[str, Any]], title: str, path: Path) -> Path:
    """The unweighted error in each bucket of time steps: mean and spread over the end of the run."""
    rows = [(line["step"], _buckets(line)) for line in lines]
    kept = [(step, buckets) for step, buckets in rows if buckets is not None]
    num = max(len(buckets) for _, buckets in kept)
    kept = [(step, buckets) for step, buckets in kept if len(buckets) == num]
    last = kept[-1][0]
    first = kept[0][0] + (1 - FINAL_SHARE) * (last - kept[0][0])
    final = np.array([buckets for step, buckets in kept if step >= first])
    early = np.array([buckets for step, buckets in kept if step < first][: len(final)])
    figure, axes = _figure()
    centres = (np.arange(num) + 0.5) / num
    _draw_buckets(
        axes, centres, final, BLUE, f"last {len(final)} lines (steps {math.ceil(first)} to {last})"
    )
    axes.set_yscale("log")
    axes.set_xlabel("time step t / T (0 = clean, 1 = noise)")
    axes.set_ylabel("mean squared error per element")
    axes.set_title(f"Error by time step, {title}")
    return _save(figure, path)
