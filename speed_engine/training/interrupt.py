"""Stopping on request: signals only set a flag; the loop saves and ends. A second Ctrl-C ends at once.

One request can arrive as several signals: a terminal sends SIGINT to the launcher and to all of its processes, a
scheduler SIGTERM to all of them, and the launcher then sends its processes SIGTERM as well. So only SIGINT after
SIGINT, which a person types, is impatience. Launchers follow with SIGKILL, DeepSpeed after 30 s.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
STOP, REQUEUE = 1, 2  # what is asked for; of many processes the largest holds
REQUEUED = 75  # exit code, EX_TEMPFAIL of sysexits.h: saved, unfinished, start me again


class Interrupt:
    """While active, a signal of `SIGNALS` sets `wanted`. A SIGHUP that nohup has taken away stays so."""

    def __init__(self) -> None:
        self.orphaned = False  # set by who watches the launcher
        self._seen: set[int] = set()
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether an end is asked for."""
        return bool(self.wanted)

    @property
    def wanted(self) -> int:
        """0, `STOP`, or `REQUEUE` after SIGUSR1, by which schedulers warn of a job's end."""
        if signal.SIGUSR1 in self._seen:
            return REQUEUE
        return STOP if self._seen or self.orphaned else 0

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._seen:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._seen.add(number)
