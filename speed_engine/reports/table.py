"""A step table as text, JSON or CSV: what `python -m speed_engine table` prints.

Every row has its noise level, its probability, its loss weight and its area (acceleration,
deceleration, convergence); the head has what the method decided, such as the row that a magnitude r
means on this schedule.
"""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import torch
from torch import Tensor

from speed_engine.progress import wrapped
from speed_engine.schedules import Schedule
from speed_engine.schedules.theory.increments import Areas, areas
from speed_engine.step_table import StepTable

FORMATS = ("text", "json", "csv")
ROW_KEYS: tuple[str, ...] = (
    "t",
    "coordinate",
    "time",
    "alpha_bar",
    "log_snr",
    "density",
    "weight",
    "area",
)
# The magnitude of the convergence area for methods that have none of their own (SpeeD's tau = 700
# on the linear schedule).
DEFAULT_R = 139.0


def report(table: StepTable, format: str = "text") -> str:
    """The table as a string. Raises ValueError for an unknown format."""
    if format == "json":
        return json.dumps(summary(table) | {"rows": rows(table)}, allow_nan=False)
    if format == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(ROW_KEYS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(table))
        return text.getvalue()
    if format == "text":
        return _text(table)
    raise ValueError(f"a table is printed as {', '.join(FORMATS)}, not as {format!r}")


def table_areas(table: StepTable) -> Areas:
    """The areas with the method's own threshold, or with r = 139, or without convergence where
    neither exists.
    """
    if table.method.tau is not None:
        return areas(table.schedule, tau=table.method.tau)
    return _plain_areas(table.schedule)


def _plain_areas(schedule: Schedule) -> Areas:
    """The areas of a schedule with r = 139."""
    try:
        return areas(schedule, r=DEFAULT_R)
    except ValueError:  # the schedule ends before: it has no convergence area
        return areas(schedule, tau=schedule.num_rows)


def _area_shares(table: StepTable) -> dict[str, float]:
    """Share of the time in each area: of the schedule, wherever a method has moved the rows."""
    if table.method.tau is not None:
        return table_areas(table).shares(table.schedule.share_edges)
    plain = table.schedule.unmoved
    return _plain_areas(plain).shares(plain.share_edges)


def summary(table: StepTable) -> dict[str, Any]:
    """Schedule, objective and method in numbers; plain Python values, ready for JSON."""
    schedule, division = table.schedule, table_areas(table)
    weighted = table.density * table.weight
    names = [division.of_row(row) for row in range(table.num_rows)]
    mass = {
        area: float(table.density[_where(names, area)].sum())
        for area in ("acceleration", "deceleration", "convergence")
    }
    decided = dict(table.method.resolved)
    if table.method.tau is not None and table.method.tau < schedule.num_rows:
        # What the threshold is in the paper's terms; far below 100 is no convergence area.
        decided["r_at_tau"] = 1 / float(schedule.alpha_bar[table.method.tau])
    return {
        "schedule": {
            "kind": schedule.kind,
            "num_rows": schedule.num_rows,
            "continuous": schedule.continuous,
            "alpha_bar_first": float(schedule.unmoved.alpha_bar[0]),
            "alpha_bar_last": float(schedule.unmoved.alpha_bar[-1]),
            "gradient_peak": division.peak,
            "area_shares": _area_shares(table),
        },
        "objective": {"kind": table.objective.kind, "learned_variance": table.learned_variance},
        "timesteps": table.timesteps.model_dump(mode="json")
        | decided
        | {"expected_weight": float(weighted.sum()), "area_mass": mass},
    }


def rows(table: StepTable) -> list[dict[str, Any]]:
    """One dictionary a row, keys ROW_KEYS; log_snr is None at zero SNR."""
    schedule, division = table.schedule, table_areas(table)
    columns = zip(
        schedule.coordinate.tolist(),
        schedule.time.tolist(),
        schedule.alpha_bar.tolist(),
        schedule.log_snr.tolist(),
        table.density.tolist(),
        table.weight.tolist(),
        strict=True,
    )
    return [
        {
            "t": row,
            "coordinate": coordinate,
            "time": time,
            "alpha_bar": alpha_bar,
            "log_snr": log_snr if math.isfinite(log_snr) else None,
            "density": density,
            "weight": weight,
            "area": division.of_row(row),
        }
        for row, (coordinate, time, alpha_bar, log_snr, density, weight) in enumerate(columns)
    ]


def _where(names: list[str], area: str) -> Tensor:
    return torch.tensor([name == area for name in names])


def _text(table: StepTable, num_lines: int = 21) -> str:
    """The summary and `num_lines` rows spread over the table; density relative to uniform."""
    head = summary(table)
    lines = [
        wrapped(
            f"{section:<10}" + " ".join(f"{key}={_short(value)}" for key, value in values.items()),
            " " * 10,
        )
        for section, values in head.items()
    ]
    lines += [
        "",
        f"{'t':>6} {'alpha_bar':>11} {'log-SNR':>8} {'T*density':>10} {'weight':>8}  area",
    ]
    every = rows(table)
    picked = torch.linspace(0, table.num_rows - 1, num_lines).round().long().unique().tolist()
    for row in (every[index] for index in picked):
        log_snr = "-inf" if row["log_snr"] is None else f"{row['log_snr']:.3f}"
        relative = row["density"] * table.num_rows
        lines.append(
            f"{row['t']:>6} {row['alpha_bar']:>11.4g} {log_snr:>8} {relative:>10.4f} "
            f"{row['weight']:>8.4f}  {row['area']}"
        )
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
