"""A rival may cost its own row, not ours: what takes too long is interrupted and said to be missing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from benchmarks.harness.refusals import Unavailable


def rival_seconds() -> float:
    """What a rival may take to be built and checked: BENCH_RIVAL_SECONDS, else any time."""
    return float(os.environ.get("BENCH_RIVAL_SECONDS", "inf"))


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Unavailable inside, as soon as Python gets to run, once `seconds` are over. Main thread only."""
    if seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_number: int, _frame: Any) -> NoReturn:
        raise Unavailable(f"not ready after {seconds:.0f} s (BENCH_RIVAL_SECONDS)")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
