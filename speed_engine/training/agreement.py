"""What many processes agree on while they train, one step later, so that none of them waits for it.

Each says at the end of a step what it asks for; what the step before's answers amount to has arrived by then.
"""

from __future__ import annotations

from speed_engine.distributed import Processes
from speed_engine.training.interrupt import REQUEUE, STOP

# Beside STOP and REQUEUE; the largest holds, and what is not done yet is asked for again.
# Nothing is larger than a step that cannot be made.
SAVE_FAILED, FOLDER_GONE, READ_FAILED = REQUEUE + 1, REQUEUE + 2, REQUEUE + 3
ENDS = (STOP, REQUEUE)


class Agreement:
    """The largest of what all processes ask for. Collective; `close` before anything else ends the group."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.arriving = processes.largest_later(0)

    def on(self, asked: int) -> int:
        """What was agreed on a step ago; one process alone has its own way at once."""
        if self.processes.world == 1:
            return asked
        agreed, self.arriving = self.arriving(), self.processes.largest_later(asked)
        return agreed

    def close(self) -> None:
        """Wait for the last answers: no process may leave before."""
        self.arriving()
