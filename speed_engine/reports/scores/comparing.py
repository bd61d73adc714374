"""Several scores side by side, refused where they were not measured alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = {
    "space": "feature space",
    "samples": "number of samples",
    "reference": "reference",
    "size": "size of pictures",
    "k": "k of the neighbours",
    "neighbours_of": "number of points among whose neighbours they were looked for",
    "kernel_subsets": "subsets of the kernel distance",
}


def compare(paths: Sequence[Path]) -> list[str]:
    """A line a report, the same numbers in columns. Raises ValueError where two were measured otherwise."""
    if len(paths) < 2:
        raise ValueError("--compare takes two reports of `score` or more")
    reports = [_read(path) for path in paths]
    first = reports[0]["measured"]
    for path, report in zip(paths[1:], reports[1:], strict=True):
        other = report["measured"]
        differing = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{path} and {paths[0]} were not measured alike, and cannot be compared: {WORDS.get(key, key)} "
                f"{_short(other.get(key))} and {_short(first.get(key))}; score both in one way"
            )
    names = [str(path) for path in paths]
    width = max(map(len, names))
    rows = [_numbers(report) for report in reports]
    shown = [key for key in rows[0] if all(key in row for row in rows)]
    lines = [" " * width + "".join(f"  {key:>10}" for key in shown)]
    for name, row in zip(names, rows, strict=True):
        lines.append(name.ljust(width) + "".join(f"  {row[key]:>10.4g}" for key in shown))
    return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report["measured"], dict):
            raise TypeError("`measured` is no mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no report of `score` that says how it was measured ({error}); score again"
        ) from error
    return report


def _numbers(report: Mapping[str, Any]) -> dict[str, float]:
    frechet = report["frechet"]
    found = {"Frechet": frechet["distance"]}
    if "same_size" in frechet:
        found["same size"] = frechet["same_size"]["mean"]
    if report.get("kernel"):
        found["kernel"] = report["kernel"]["mean"]
    if near := report.get("neighbours"):
        found |= {name: near[name] for name in ("precision", "recall", "density", "coverage")}
    if report.get("class_agreement"):
        found["agreement"] = report["class_agreement"]["agreement"]
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
