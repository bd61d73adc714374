"""Manifests: JSON that says when it is damaged, by a format number and a SHA-256 over its whole content.

The hash is of the content, not of the bytes: of canonical JSON (sorted keys, no spaces) without the field itself. The
first format had neither; it is read as it is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

FORMAT = 2
# All that a manifest of the first format can hold; with anything else it is a damaged one of a later format.
FIRST_FORMAT = {
    "attention",
    "config",
    "data",
    "deepspeed_config",
    "device",
    "distribution",
    "engine",
    "files",
    "kernels",
    "optimizer",
    "parameters",
    "processes",
    "step",
    "threads",
    "versions",
}


class Damaged(ValueError):
    """A manifest that cannot be what was written; the text names the file."""


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """`content` as plain JSON with its format and hash. Raises ValueError on NaN and infinity."""
    plain = json.loads(json.dumps({**content, "format": FORMAT}, allow_nan=False, default=str))
    return {**plain, "sha256": _digest(plain)}


def read(path: Path) -> dict[str, Any]:
    """The content of a manifest, without format and hash. Raises Damaged, or OSError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged: it holds no JSON object")
    stated, number = value.pop("sha256", None), value.get("format", 1)
    if number not in (1, FORMAT) or isinstance(number, bool):
        raise Damaged(
            f"{path} has the format {number!r}, and this version knows 1 and {FORMAT}; "
            "it is damaged, or of a newer version"
        )
    if number == 1:
        strange = sorted(value.keys() - FIRST_FORMAT - {"format"})
        if stated is not None or strange:
            raise Damaged(f"{path} is damaged: its keys are of no known format")
    elif stated != _digest(value):
        raise Damaged(f"{path} is damaged: its SHA-256 is of another content")
    value.pop("format", None)
    return value


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of a manifest")
