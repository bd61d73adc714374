"""Stopping on request: signals only set a flag; the loop saves and ends. A second Ctrl-C ends at once.

One request can arrive as several signals: a terminal sends SIGINT to the launcher and to all of its processes, a
scheduler SIGTERM to all of them, and the launcher then sends its processes SIGTERM as well. So only SIGINT after
SIGINT, which a person types, is impatience. Launchers follow with SIGKILL, DeepSpeed after 30 s.
"""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """While active, SIGINT, SIGTERM and SIGUSR1 set `requested`."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return bool(self._seen)

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
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
