"""From the curves of a study's cells to its findings: plain numbers, a function of what report.json stores and no more.

null stands for infinity in `needed` (the run did not reach the target) and in `high` (nothing bounds the ratio), and
for a value that is not finite in a curve.
"""

from __future__ import annotations

import dataclasses
import math
import statistics as plain
from collections.abc import Sequence
from typing import Any

import numpy as np

from speed_engine.studies import statistics
from speed_engine.studies.statistics import Interval
from speed_engine.studies.study import Study
from speed_engine.training.metrics_file import finite

AXES = ("images", "flops", "seconds")
SAME = Interval(1.0, 1.0, 1.0, 0, 0)  # the baseline against itself
Curves = dict[tuple[str, str, int], dict[str, Any]]  # (setting, method, seed) -> a stored cell


def findings(study: Study, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that the report says, JSON-able: {"settings": {name: ...}, "profile": ...}."""
    curves: Curves = {(cell["setting"], cell["method"], cell["seed"]): cell for cell in cells}
    settings = {setting: _setting(study, curves, setting) for setting in study.settings}
    return finite({"settings": settings, "profile": _profile(study, settings)})


def final(cell: dict[str, Any]) -> float:
    """The last value of a cell's curve; infinity where it diverged or the value is not finite."""
    values = cell["curve"]["values"]
    if cell["status"] == "diverged" or not values or values[-1] is None:
        return math.inf
    return float(values[-1])


def needed(cell: dict[str, Any], axis: str, target: float) -> float:
    """What a cell spent until it reached the target; infinity if it did not, or diverged."""
    if cell["status"] == "diverged":
        return math.inf
    values = [math.inf if value is None else value for value in cell["curve"]["values"]]
    return statistics.crossing(cell["curve"][axis], values, target)


def _setting(study: Study, curves: Curves, setting: str) -> dict[str, Any]:
    cells = {
        method: [curves[setting, method, seed] for seed in study.seeds] for method in study.methods
    }
    base = cells[study.reference]
    target = (
        plain.median(final(cell) for cell in base) if study.target == "baseline" else study.target
    )
    methods = {method: _method(own, base, target) for method, own in cells.items()}
    return {"target": target, "methods": methods}


def _method(own: list[dict[str, Any]], base: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """One method of one setting against the baseline."""
    finals, base_finals = [final(cell) for cell in own], [final(cell) for cell in base]
    twins, strangers = statistics.spread_of_pairs(finals, base_finals)
    found: dict[str, Any] = {
        "final": finals,
        "final_mean": math.inf if math.inf in finals else plain.fmean(finals),
        "final_std": math.nan if math.inf in finals else plain.stdev(finals),
        "final_ratio": _told(
            SAME if own is base else statistics.ratio_interval(finals, base_finals),
            "lower",
            "higher",
        ),
        "final_twins": statistics.correlation(_logs(finals), _logs(base_finals)),
        "spread_twins": twins,
        "spread_strangers": strangers,
        "diverged": sum(cell["status"] == "diverged" for cell in own),
    }
    for axis in AXES:
        mine, theirs = ([needed(cell, axis, target) for cell in each] for each in (own, base))
        interval = (
            SAME
            if own is base
            else statistics.ratio_interval(mine, theirs, *spent(own, base, axis))
        )
        found[axis] = {
            "needed": mine,
            "ratio": _told(interval, "faster", "slower"),
            "twins": statistics.correlation(_logs(mine), _logs(theirs)),
        }
    found["reached"] = sum(map(math.isfinite, found["images"]["needed"]))
    return found


def spent(
    own: list[dict[str, Any]], base: list[dict[str, Any]], axis: str
) -> tuple[list[float], list[float]]:
    """All that every run spent; a diverged one counts as if it had gone on as long as the longest."""
    ends = [cell["curve"][axis][-1] for cell in (*own, *base) if cell["curve"][axis]]
    longest = max(ends, default=1.0)

    def end(cell: dict[str, Any]) -> float:
        return longest if cell["status"] == "diverged" else cell["curve"][axis][-1]

    return [end(cell) for cell in own], [end(cell) for cell in base]


def _told(interval: Interval, lower: str, higher: str) -> dict[str, Any]:
    """The interval with its verdict in words."""
    verdict = {"lower": lower, "higher": higher}.get(interval.verdict, interval.verdict)
    return {**dataclasses.asdict(interval), "verdict": verdict}


def _logs(values: list[float]) -> list[float]:
    return [math.log(value) if 0 < value < math.inf else math.inf for value in values]


def _profile(study: Study, settings: dict[str, Any]) -> dict[str, Any]:
    """AlgoPerf's profile over the pairs of setting and seed, by images."""
    names = list(study.methods)
    cost_PM = np.array(
        [
            [found["methods"][name]["images"]["needed"][index] for name in names]
            for found in settings.values()
            for index in range(len(study.seeds))
        ]
    )
    ratios, shares = statistics.profile(cost_PM)
    scores = statistics.profile_score(ratios, shares)
    return {
        "ratios": ratios.tolist(),
        "shares": {name: shares[:, index].tolist() for index, name in enumerate(names)},
        "scores": {name: float(scores[index]) for index, name in enumerate(names)},
    }
