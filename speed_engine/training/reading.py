"""The batches of a step, in hand before the step begins, without a word between processes in the ordinary case.

A process that cannot read a sample must not leave the others waiting in the middle of a step. So many processes read
two steps ahead: whoever fails has another whole step's time to say so, with the answer that all give to each other at
the end of each step anyway (`agreement.py`). Only the first two steps are agreed on by themselves. One process alone
reads what it needs when it needs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from speed_engine.data import Batch
from speed_engine.distributed import Processes

AHEAD = 2  # steps; what is asked for at the end of one is known at the end of the next


class Reading:
    """Reads the steps first .. end - 1, one after the other. read: the micro-batches of the next one."""

    def __init__(
        self, read: Callable[[], list[Batch]], processes: Processes, first: int, end: int
    ) -> None:
        self.read, self.processes = read, processes
        self.left = end - first
        self.ready: deque[list[Batch]] = deque()
        self.failure: Exception | None = None
        self.given = 0

    def next(self) -> list[Batch]:
        """The micro-batches of the next step. Collective for the first two; raises what reading raises.

        Before each of the others `look_ahead` is called, and what it finds is told to all.
        """
        if self.processes.world == 1:
            return self.read()
        if self.given == 0:
            self.processes.attempt(self._one_more)
            self.look_ahead()
        elif self.given < AHEAD:  # too early for the others to have been told
            self.processes.end_together(None if self.ready else self.failure)
        self.given += 1
        return self.ready.popleft()

    def look_ahead(self) -> bool:
        """After a step: read the step after the next one. False if that failed; `end_together` then tells why."""
        if self.processes.world > 1 and self.failure is None:
            try:
                self._one_more()
            except Exception as error:
                self.failure = error
        return self.failure is None

    def end_together(self) -> None:
        """Raise what a process could not read, on all of them (SaidElsewhere on the others). Collective."""
        self.processes.end_together(self.failure)

    def _one_more(self) -> None:
        if self.left:
            self.ready.append(self.read())
            self.left -= 1
