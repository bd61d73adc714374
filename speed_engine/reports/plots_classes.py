"""How often a sample is what it was asked to be, class by class, under the classes' own names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.reports.style import BLUE, INK, figure

MOST = 60  # classes in one picture; of more, the worst


def agreement_of(report: Path) -> dict[int, tuple[float, int]]:
    """Class -> (share, samples) of a report of `score`; empty where there is none. Raises ValueError if damaged."""
    if not report.exists():
        return {}
    try:
        told = json.loads(report.read_text(encoding="utf-8")).get("class_agreement")
        table = (told or {}).get("by_class", {})
        return {int(c): (float(row["agreement"]), int(row["samples"])) for c, row in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{report} cannot be read ({error}); score the samples again") from error


def plot_agreement(
    found: Mapping[int, tuple[float, int]], names: Sequence[str], subtitle: str, path: Path
) -> Path:
    """A bar a class, in the order of classes, with Wilson's 95 % interval of the share. Returns `path`."""
    chosen = list(found)
    if len(chosen) > MOST:
        chosen = sorted(sorted(chosen, key=lambda c: found[c][0])[:MOST])
        subtitle = f"{subtitle}; the worst {MOST} of {len(found)} classes"
    share = np.array([found[c][0] for c in chosen])
    num = np.array([found[c][1] for c in chosen])
    low, high = wilson(share, num)
    place = np.arange(len(chosen))
    with figure("Class agreement", subtitle, path) as axes:
        axes.figure.set_figheight(max(2.8, 1.6 + 0.28 * len(chosen)))
        axes.grid(False, axis="y")
        bars: Any = axes.barh(place, share, color=BLUE, height=0.7)
        axes.errorbar(
            share, place, xerr=[share - low, high - share], fmt="none", ecolor=INK, elinewidth=1
        )
        axes.set_yticks(place, [_name(c, names) for c in chosen], fontsize=9)
        axes.set_ylim(len(chosen) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of samples that are classified as what was asked for")
        assert len(bars) == len(chosen)
    return path


def wilson(share: np.ndarray, num: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of a share of `num` tries (Wilson 1927): of none and of all as well."""
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * np.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    return np.minimum(centre - half, share).clip(0), np.maximum(centre + half, share).clip(None, 1)


def _name(number: int, names: Sequence[str]) -> str:
    if number < len(names) and names[number] != str(number):
        return f"{names[number][:24]} ({number})"
    return str(number)
