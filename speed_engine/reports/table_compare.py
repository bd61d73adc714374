"""Where each time-step method spends its training: density times weight by log-SNR, side by side.

What `python -m speed_engine table --compare speed,min_snr,...` prints. Sampling a step more often
and weighing it more are the same expectation, so only the product of density and weight,
normalised, says where the loss comes from.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping

import torch
from pydantic import BaseModel
from torch import Tensor

from speed_engine.step_table import StepTable, build_step_table
from speed_engine.timesteps import parse

# Upper edges of the bins of log-SNR, from clean to noisy.
BINS = (">5", "2..5", "0..2", "-2..0", "-5..-2", "<-5")
_EDGES = (5.0, 2.0, 0.0, -2.0, -5.0)


def tables(
    schedule: BaseModel, objective: BaseModel, kinds: list[str], learned_variance: bool = False
) -> dict[str, StepTable]:
    """The tables of several methods with their default parameters on one schedule and objective.

    Raises ValueError that lists what exists, or where a method refuses the schedule.
    """
    return {
        kind: build_step_table(schedule, objective, parse(kind), learned_variance) for kind in kinds
    }


def shares(table: StepTable) -> Tensor:
    """Share of density x weight in each of BINS; float64 [6], sums to one."""
    effective = (table.density * table.weight).cpu()
    effective = effective / effective.sum()
    # torch.bucketize wants rising edges: count the edges that a row's log-SNR is above.
    place = len(_EDGES) - torch.bucketize(
        table.schedule.log_snr, torch.tensor(_EDGES[::-1]).double()
    )
    return torch.zeros(len(BINS), dtype=torch.float64).index_add_(0, place, effective)


def compare(tables: Mapping[str, StepTable], format: str = "text") -> str:
    """One line a method: its share of the loss in each bin of log-SNR. text, json or csv."""
    rows = {name: shares(table).tolist() for name, table in tables.items()}
    if format == "json":
        return json.dumps({"bins": list(BINS), "shares": rows})
    if format == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", *BINS])
        writer.writerows([name, *values] for name, values in rows.items())
        return text.getvalue()
    if format != "text":
        raise ValueError(f"a comparison is printed as text, json or csv, not as {format!r}")
    width = max([len(name) for name in rows] + [len("log-SNR")])
    lines = [f"{'log-SNR':<{width}}" + "".join(f"{label:>8}" for label in BINS)]
    for name, values in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"{value:>8.3f}" for value in values))
    return "\n".join(lines)
