"""`metrics.jsonl`: one JSON object a line, in the order of steps; who writes it, reads it and cuts it off.

A number that is not finite is written as null, since JSON has no word for it. A killed run may leave its last line
half-written, which is no damage: that line is passed over.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from speed_engine.atomic_files import write_text


def line_of(values: dict[str, Any]) -> str:
    """A line of the file, with its end."""
    return json.dumps(finite(values), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same value with None for every float that is NaN or infinite, also inside lists and dictionaries."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that hold a step, in the order of steps; of a step written twice the later line.

    Raises ValueError for a missing file and, with its number, for a broken line that is not the last.
    """
    lines = _lines(path)
    for number, (_, line) in enumerate(lines[:-1], start=1):
        if line is None:
            raise ValueError(f"{path}, line {number} is not JSON; remove that line")
    by_step = {
        line["step"]: line for _, line in lines if line is not None and _step(line) is not None
    }
    return [by_step[step] for step in sorted(by_step)]


def cut_off_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, which will be made again, and the broken ones. No file: nothing to do."""
    if not path.exists():
        return
    kept = []
    for raw, line in _lines(path):
        number = None if line is None else _step(line)
        if number is not None and number <= step:
            kept.append(raw + "\n")
    text = "".join(kept)
    if text.encode() != path.read_bytes():
        write_text(path, text)


def _lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Every line that is not empty, as text and as what it holds; None where that is no JSON object."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; give the folder of a run that has started training"
        ) from None
    return [(raw, _object(raw)) for raw in text.splitlines() if raw.strip()]


def _object(raw: str) -> dict[str, Any] | None:
    try:
        value = json.loads(raw, parse_constant=lambda word: None)  # earlier versions wrote NaN
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _step(line: dict[str, Any]) -> int | None:
    step = line.get("step")
    return step if type(step) is int else None
