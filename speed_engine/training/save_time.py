"""How long a checkpoint takes, against the time that a stop leaves: launchers kill half a minute after SIGTERM.

DeepSpeed's waits 30 s, and so do SLURM (KillWait) and Kubernetes as they come. A save that takes longer is lost each
time the run is stopped, so this is told at the start, from the rate at which the run folder takes a small file.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np

from speed_engine.atomic_files import sync
from speed_engine.training.checkpoint import human

PATIENCE = 30.0  # seconds
PROBE = 2**26  # bytes
WORTH_A_PROBE = 2**30  # smaller ones pass on the slowest disk that anybody trains on


def checkpoint_bytes(trained: int, averages: int) -> int:
    """About how many bytes one checkpoint of `trained` parameters with that many EMAs has.

    All in float32: the state's weights, two moments and EMAs, and both files of weights beside it.
    """
    return 4 * trained * (3 + averages + 2)


def rate(folder: Path) -> float:
    """Bytes a second at which `folder` takes a file: written, made durable, and read for its SHA-256, as a
    checkpoint's are. Raises OSError."""
    path = folder / ".rate.partial"
    content = np.random.default_rng(0).bytes(PROBE)  # what storage could compress would flatter it
    try:
        began = time.monotonic()
        path.write_bytes(content)
        sync(path)
        hashlib.sha256(path.read_bytes())
        return PROBE / max(time.monotonic() - began, 1e-9)
    finally:
        path.unlink(missing_ok=True)


def at_start(folder: Path, size: int) -> str | None:
    """A sentence for a person where checkpoints of `size` bytes will take longer than a stop leaves, or None."""
    if size < WORTH_A_PROBE:
        return None
    try:
        found = rate(folder)
    except OSError:
        return None  # the save itself says what is wrong, and to whom
    return too_long(size / found, f"{human(size)} at the {human(found)} a second measured there")


def too_long(seconds: float, why: str) -> str | None:
    """The same sentence of a time that is known; why: stands in brackets."""
    if seconds <= PATIENCE:
        return None
    return (
        f"a checkpoint takes about {seconds:.0f} s ({why}), and a launcher that stops a run kills it after "
        f"{PATIENCE:.0f} s: a stop then loses what came after the last checkpoint; save more often "
        "(checkpoint.every), write to faster storage, or let the scheduler ask earlier (sbatch --signal=USR1@600)"
    )
