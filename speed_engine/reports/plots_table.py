"""Pictures of step tables: P(t) and w(t), process increments with the three areas, and methods side by side.

The first two are the counterparts of figures 1 to 3 of the SpeeD paper, drawn from the true table.
matplotlib is imported when a picture is drawn and used through its object interface (Agg, no
display, no global state).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed_engine.reports.style import INK, LINES, alike, line, save
from speed_engine.reports.table import table_areas
from speed_engine.schedules import Schedule
from speed_engine.schedules.theory import increments
from speed_engine.step_table import StepTable

AREA_COLORS = {"acceleration": "#f4d9c6", "deceleration": "#d5e3f0", "convergence": "#e6e6e6"}


def plot_table(table: StepTable, out: Path, ending: str = "png") -> list[Path]:
    """P(t), w(t) and the increments of one table, as files of the format `ending` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    name = f"{getattr(table.timesteps, 'kind', 'table')}_{table.schedule.kind}"
    return [
        _sampling_and_weight(table, out / f"timesteps_{name}.{ending}"),
        _increments(table, out / f"increments_{table.schedule.kind}.{ending}"),
    ]


def plot_comparison(tables: Mapping[str, StepTable], path: Path) -> Path:
    """Density, weight and effective density of several methods, against time and against log-SNR, in one picture.

    Densities are relative to uniform in time, per unit of log-SNR on the right; weights have mean one under
    the method's density. Curves that lie on each other are named in their panel.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = _figure(3, 2, (11, 10.5))
    curves: list[dict[str, np.ndarray]] = [{}, {}, {}]
    rows = ("sampling density", "loss weight", "density x weight")
    for index, (name, table) in enumerate(tables.items()):
        style = line(index, len(tables)) | {"label": name}
        on = table.schedule
        keep = torch.isfinite(on.log_snr)
        time, level = _places(on), on.log_snr[keep]
        density, weight = table.density.cpu(), table.weight.cpu()
        weight = weight / (density * weight).sum()
        # Mass per unit of the axis: of time (as a share of T), of log-SNR.
        width = (on.measure / on.measure.sum(), _widths(level))
        for row, mass in enumerate((density, weight, density * weight)):
            curves[row][name] = (mass if row == 1 else mass / width[0]).numpy()
            if row == 1:
                axes[row][0].plot(time, mass, **style)
                axes[row][1].plot(level, mass[keep], **style)
            else:
                axes[row][0].plot(time, mass / width[0], **style)
                axes[row][1].plot(level, mass[keep] / width[1], **style)
    first = next(iter(tables.values()))
    for row, title in enumerate(rows):
        axes[row][0].set_title(f"{title} by time", loc="left", fontsize=10)
        axes[row][1].set_title(f"{title} by log-SNR", loc="left", fontsize=10)
        _name_alike(axes[row][0], curves[row])
        _log_if_sigma(axes[row][0], first.schedule)
        axes[row][1].set_xlim(12, -12)
        axes[row][0].set_ylabel("mean weight = 1" if row == 1 else "uniform = 1")
        axes[row][1].set_ylabel("mean weight = 1" if row == 1 else "per unit of log-SNR")
        for axis in axes[row]:
            axis.set_ylim(bottom=0)
    _limit_weights(axes[1])
    axes[2][0].set_xlabel(_time_label(first))
    axes[2][1].set_xlabel("log-SNR (left = clean)")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        handlelength=4,
        loc="outside lower center",
        ncols=min(5, len(tables)),
        frameon=False,
        fontsize=9,
    )
    return save(figure, path, dpi=120)


def _sampling_and_weight(table: StepTable, path: Path) -> Path:
    figure, axes = _figure(2, 1, (7.5, 6.2), sharex=True)
    time = _places(table.schedule)
    uniform = (table.schedule.measure / table.schedule.measure.sum()) * 1.0
    density = table.density.cpu() / uniform
    for row, (column, title) in enumerate(
        ((density, "P(t), uniform = 1"), (table.weight.cpu(), "w(t), loss weight"))
    ):
        axis = axes[row][0]
        _shade(axis, table, named=row == 0)
        axis.plot(time, column, color=LINES[row], lw=1.6)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(0, 1.12 * float(column.max()))
    axes[1][0].set_xlabel(_time_label(table))
    kind = getattr(table.timesteps, "kind", "")
    figure.suptitle(f"{kind} on the {table.schedule.kind} schedule", fontsize=11, color=INK)
    return save(figure, path, dpi=120)


def _increments(table: StepTable, path: Path) -> Path:
    """Mean and variance of process increments, and the rate whose peak and decay divide the areas.

    Where the noise explodes the variance has no plateau; the noise fraction u takes its place.
    """
    # Of the schedule as configured: a method's rows can be far apart where it hardly ever draws.
    on = table.schedule.unmoved
    time = _places(on)
    extent = on.measure.sum()
    (mean_rate,) = torch.gradient(on.alpha, spacing=(on.coordinate,))
    panels: list[tuple[Tensor, Tensor, str]] = []
    if on.alpha.max() - on.alpha.min() > 1e-9:
        panels.append((time, mean_rate.abs() * extent, "|d alpha / dt|, change of the mean"))
    if on.sigma.max() <= 1:
        between = (time[1:] + time[:-1]) / 2  # here sigma is no axis: it ends at 1
        panels.append((between, increments.psi(on), "Psi, variance of two independent neighbours"))
    else:
        panels.append((time, on.noise_fraction, "u = 1 / (1 + SNR), noise fraction"))
    panels.append((time, on.noise_rate * extent, "du/dt, growth of the noise fraction"))
    figure, axes = _figure(len(panels), 1, (7.5, 2.8 * len(panels)), sharex=True)
    for row, (x, y, title) in enumerate(panels):
        axis = axes[row][0]
        _shade(axis, table, named=row == 0)
        axis.plot(x, y, color=LINES[row], lw=1.6)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylim(0, 1.15 * float(y.max()))
    axes[-1][0].set_xlabel(_time_label(table))
    figure.suptitle(f"process increments of the {on.kind} schedule", fontsize=11, color=INK)
    return save(figure, path, dpi=120)


def _shade(axis: Any, table: StepTable, named: bool) -> None:
    """The three areas behind a plot over time."""
    division = table_areas(table)
    edges = _edges(table.schedule)
    peak = min(division.peak, division.tau)
    ends = (0, peak, division.tau, table.num_rows)
    for area, start, end in zip(increments.AREAS, ends[:-1], ends[1:], strict=True):
        left, right = float(edges[start]), float(edges[end])
        if right <= left:
            continue
        axis.axvspan(left, right, color=AREA_COLORS[area], lw=0)
        shares = table.schedule.share_edges
        if named and float(shares[end] - shares[start]) > 0.12:
            middle = (left * right) ** 0.5 if _is_sigma(table.schedule) else (left + right) / 2
            axis.text(
                middle, 0.97, area, ha="center", va="top", fontsize=8, color=INK,
                transform=axis.get_xaxis_transform(),
            )  # fmt: skip
    axis.set_xlim(float(edges[0]), float(edges[-1]))
    _log_if_sigma(axis, table.schedule)


def _name_alike(axis: Any, curves: Mapping[str, np.ndarray]) -> None:
    """Above the panel, which curves lie on each other."""
    groups = [" = ".join(group) for group in alike(curves)]
    said = "\n".join(textwrap.wrap("; ".join(groups), 52, break_on_hyphens=False))
    axis.set_title(said, loc="right", fontsize=7, color=INK)


def _limit_weights(axes: list[Any]) -> None:
    """Keep weights that run off (debiased at the noisy end) from flattening the others."""
    tops = [float(line.get_ydata().max()) for line in axes[0].get_lines()]
    limit = 1.1 * min(max(tops), max(4.0, 2 * sorted(tops)[len(tops) // 2]))
    for axis in axes:
        axis.set_ylim(0, limit)


def _is_sigma(schedule: Schedule) -> bool:
    """Whether the coordinate is ln sigma, so that sigma on a logarithmic axis is the place of a row."""
    return schedule.kind in ("edm", "ve")


def _edges(schedule: Schedule) -> Tensor:
    """The edges of the rows' cells on the axis; float64 [T+1]: t / T, or sigma."""
    if not _is_sigma(schedule):
        return schedule.share_edges
    first = schedule.coordinate[:1] - schedule.measure[:1] / 2
    return torch.cat([first, first + schedule.measure.cumsum(0)]).exp()


def _places(schedule: Schedule) -> Tensor:
    """The rows' places on the axis; float64 [T]."""
    if _is_sigma(schedule):
        return schedule.sigma
    edges = schedule.share_edges
    return (edges[1:] + edges[:-1]) / 2


def _log_if_sigma(axis: Any, schedule: Schedule) -> None:
    if _is_sigma(schedule):
        axis.set_xscale("log")


def _time_label(table: StepTable) -> str:
    name = "sigma" if _is_sigma(table.schedule) else "t / T"
    ends = "small = clean, large = noise" if _is_sigma(table.schedule) else "0 = clean, 1 = noise"
    return f"{name} ({ends})"


def _widths(level: Tensor) -> Tensor:
    """Width of the cell around every log-SNR (falling); float64 [T]."""
    middle = (level[1:] + level[:-1]) / 2
    edges = torch.cat([2 * level[:1] - middle[:1], middle, 2 * level[-1:] - middle[-1:]])
    return -edges.diff()


def _figure(rows: int, columns: int, size: tuple[float, float], sharex: bool = False) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=INK)
    return figure, axes
