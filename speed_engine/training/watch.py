"""A thread beside the training that reads clocks alone, and ends the process where it waits in vain.

Python runs signal handlers in the main thread, between two of its instructions: not while that thread waits inside a
collective or a read. The operating system's own handler writes the signal's number into a socket (`set_wakeup_fd`),
which this thread reads. What it decides:

- a signal while nothing is trained yet ends the process at once: nothing is lost;
- a request that the loop does not come to within `PATIENCE` seconds, and a second SIGINT, end it;
- the loop stands still for `stall_seconds` (`first_step_seconds` until the first step is done, and while it saves,
  validates or draws, unless all processes do nothing but wait for each other): it says whom it waits for, and ends;
- the launcher is gone: a request to stop, as if by signal, which at the start ends at once, too.

Ending is `os._exit` after one sentence: the main thread cannot be asked, and files are whole or absent anyway.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from speed_engine.training import heartbeat
from speed_engine.training.heartbeat import Pulse
from speed_engine.training.interrupt import REQUEUED, SIGNALS, Interrupt

LOST = 4  # exit code: another process is gone or frozen, or a request could not be answered
PATIENCE = 20.0  # seconds for the loop to come to a request; launchers kill after 30
TICK = 0.5


class Watch:
    """While active, the thread runs. `at_work` tells it what a run is about once that is known."""

    def __init__(self, interrupt: Interrupt, pulse: Pulse, rank: int, world: int) -> None:
        self.interrupt, self.pulse = interrupt, pulse
        self.rank, self.world = rank, world
        self.folder: Path | None = None
        self.held: tuple[int, int] | None = None
        self.stall = self.first_stall = 0.0
        self.gone = False  # the run folder, when last looked at
        self.asked: float | None = None
        self.impatient: float | None = None
        self.last = signal.SIGTERM
        self.launchers = _launchers() if world > 1 or "RANK" in os.environ else {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def at_work(self, run: Path, stall: float, first_stall: float) -> None:
        """The run folder, which is looked after from now on, and `train.stall_seconds`, `train.first_step_seconds`."""
        self.stall, self.first_stall = stall, first_stall
        self.held, self.gone = _identity(run), False
        if self.world > 1:
            (run / heartbeat.FOLDER).mkdir(parents=True, exist_ok=True)
            heartbeat.write(run, self.rank, self.pulse)
        self.folder = run

    def __enter__(self) -> Watch:
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        signal.set_wakeup_fd(self.before)
        self.writer.close()  # wakes the thread
        self.thread.join()
        self.reader.close()

    def folder_is_there(self) -> bool:
        """Whether the run folder is still the one that this run holds."""
        return self.folder is None or _identity(self.folder) == self.held

    def ended(self, words: str) -> None:
        """Leave word of an error for those who will wait for this process."""
        if self.folder is not None and self.world > 1:
            self.pulse.phase, self.pulse.words = (
                "ended",
                words.splitlines()[0][:300] if words else "",
            )
            heartbeat.write(self.folder, self.rank, self.pulse)

    def _watch(self) -> None:
        tick, written = time.monotonic(), 0.0
        while not self.over.is_set():
            readable, _, _ = select.select([self.reader], [], [], TICK)
            numbers = self.reader.recv(64) if readable else b""
            if self.over.is_set():
                return
            now = time.monotonic()
            if now - tick > 10 * TICK:  # this process itself was frozen, all of it
                self.pulse.at = max(self.pulse.at, now - TICK)
            tick = now
            for number in numbers:
                self._hear(number, now)
            self._judge(now)
            if self.folder is not None and now - written > heartbeat.interval(self.world):
                written = now
                self.gone = not self.folder_is_there()
                if self.world > 1:
                    heartbeat.write(self.folder, self.rank, self.pulse)

    def _hear(self, number: int, now: float) -> None:
        if number not in SIGNALS:
            return
        if number == signal.SIGINT and self.asked is not None and self.last == signal.SIGINT:
            self.impatient = now
        self.asked = self.asked or now
        if self.last != signal.SIGUSR1:
            self.last = signal.Signals(number)
        if self.pulse.phase == "start":
            code = REQUEUED if number == signal.SIGUSR1 else 128 + number
            name = signal.Signals(number).name
            self._end(code, f"stopped by {name} before the first step; nothing is lost")

    def _judge(self, now: float) -> None:
        pulse, still = self.pulse, now - self.pulse.at
        gone = [pid for pid, born in self.launchers.items() if _born(pid) != born]
        if gone and not self.interrupt.orphaned:
            self.interrupt.orphaned = True
            if pulse.phase == "start":
                words = f"the launcher, process {gone[0]}, was gone before the first step"
                self._end(LOST, f"{words}; nothing is lost")
            _say(self.rank, f"the launcher, process {gone[0]}, is gone: a request to stop")
            self.asked = self.asked or now
        if self.impatient is not None and now - self.impatient > TICK:
            self._end(128 + signal.SIGINT, f"interrupted twice; {self._kept()}")
        unanswered = 0.0 if self.asked is None else min(now - self.asked, still)
        if unanswered > PATIENCE and pulse.phase not in (*heartbeat.SLOW, "ended"):
            self._end(LOST, f"asked to stop, but {self._waits(still)}; {self._kept()}")
        first = not pulse.done or pulse.phase in heartbeat.SLOW
        if first and self._in_vain():
            first, still = False, pulse.waits()
        limit = self.first_stall if first else self.stall
        if self.folder is not None and limit and still > limit and pulse.phase != "ended":
            key = "train.first_step_seconds" if first else "train.stall_seconds"
            self._end(LOST, f"{self._waits(still)} ({key}={limit:g}); {self._kept()}")

    def _in_vain(self) -> bool:
        """Whether this process and all others have waited for each other for `stall` seconds: no storage is slow."""
        if self.folder is None or not self.stall or not self.pulse.done:
            return False
        return self.pulse.waits() > self.stall and heartbeat.none_works(
            self.folder, self.rank, self.world, self.stall
        )

    def _waits(self, still: float) -> str:
        what = {"data": "the next batch", "step": "a step's end", **heartbeat.SLOW}
        for_what = what.get(self.pulse.phase, self.pulse.phase)
        text = f"step {self.pulse.step} has waited {still:.0f} s for {for_what}"
        if self.world > 1 and self.folder is not None:
            text += f": {heartbeat.missing(self.folder, self.rank, self.world)}"
        return text

    def _kept(self) -> str:
        return kept(self.pulse)

    def _end(self, code: int, sentence: str) -> None:
        _say(self.rank, sentence)
        os._exit(code)


def kept(pulse: Pulse) -> str:
    """What the same command will continue from."""
    if pulse.saved is None:
        return "no checkpoint is there yet"
    return f"the same command continues from step {pulse.saved}"


def _say(rank: int, sentence: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        who = f" (process {rank})" if rank else ""
        print(f"error{who}: {sentence}", file=sys.stderr, flush=True)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _launchers() -> dict[int, str | None]:
    """The process that started this one, and the one behind DeepSpeed's launch.py -> when each was born."""
    parent = os.getppid()
    found = {parent: _born(parent)}
    with contextlib.suppress(OSError, IndexError, ValueError):
        if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
            grandparent = int(_stat(parent)[1])
            found[grandparent] = _born(grandparent)
    return {pid: born for pid, born in found.items() if pid > 1 and born is not None}


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _born(pid: int) -> str | None:
    """When the process began, in the kernel's ticks; None if it is gone, dead, or the system has no /proc."""
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return fields[19] if fields[0] not in "ZX" else None
