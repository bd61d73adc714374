"""Which state of the code a cell was trained by: a study goes on for days, over commits."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def current() -> str | None:
    """The commit of the code, with `+changes` where files differ from it; None outside a repository."""
    root = Path(__file__).parents[2]
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def told(commits: Iterable[str | None]) -> str:
    """`commit C`, or how many cells each of several commits trained, the most first."""
    counted = Counter(each or "unknown" for each in commits).most_common()
    if len(counted) == 1:
        return f"commit {counted[0][0]}"
    return "commits " + ", ".join(f"{each} ({number} cells)" for each, number in counted)
