"""Where each process is: one small file a process in the run folder, so that those who wait can name whom for.

    run/heartbeats/00001.json   {"rank": 1, "host": "node3", "pid": 4711, "step": 40, "phase": "step", "time": ...}

The training thread only sets numbers in memory (`Pulse.beat`); a thread beside it writes the file (`watch.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from speed_engine.distributed import Waiting

T = TypeVar("T")
FOLDER = "heartbeats"
SLOW = {"save": "a checkpoint", "validate": "the validation", "draw": "pictures"}  # phases


@dataclass
class Pulse:
    """What the training thread does. phase: start, data, step, one of SLOW, or ended.

    done: steps finished since the start of this process. saved: step of the newest checkpoint, if any. waiting: for
    the other processes.
    """

    step: int = 0
    phase: str = "start"
    done: int = 0
    saved: int | None = None
    words: str = ""
    at: float = field(default_factory=time.monotonic)
    waiting: Waiting = field(default_factory=Waiting)

    def waits(self) -> float:
        """Seconds that it has waited for the others in an agreement; 0 where it does not."""
        since = self.waiting.since
        return 0.0 if since is None else time.monotonic() - since

    def beat(self, phase: str, step: int | None = None) -> None:
        """The training thread begins `phase`, after `step` finished steps."""
        self.phase, self.at = phase, time.monotonic()
        if step is not None:
            self.done += step > self.step
            self.step = step

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase` until it is left, then the one before."""
        before = self.phase
        self.beat(phase)
        try:
            yield
        finally:
            self.beat(before)


@dataclass(frozen=True)
class Heartbeat:
    """One process's file. time: of the writing, seconds since 1970 by its host's clock. waits: see `Pulse.waits`."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    words: str
    time: float
    waits: float = 0.0


def noted(batches: Iterator[T], pulse: Pulse) -> Iterator[T]:
    """The same batches; `pulse` knows when one is waited for."""
    while True:
        pulse.beat("data")
        try:
            batch = next(batches)
        except StopIteration:
            return
        pulse.beat("step")
        yield batch


def interval(world: int) -> float:
    """Seconds between two writings: files of all processes may lie on one network disk."""
    return min(30.0, 1.0 + world / 16)


def write(run: Path, rank: int, pulse: Pulse) -> None:
    """Write this process's file; a disk that refuses it is none of the training's business."""
    beat = Heartbeat(
        rank,
        socket.gethostname(),
        os.getpid(),
        pulse.step,
        pulse.phase,
        pulse.words,
        time.time(),
        round(pulse.waits(), 1),
    )
    path = run / FOLDER / f"{rank:05d}.json"
    with contextlib.suppress(OSError):
        scrap = path.with_suffix(".partial")
        scrap.write_text(json.dumps(asdict(beat)), encoding="utf-8")
        scrap.replace(path)


def forget(run: Path) -> None:
    """Remove the files of a run that never began."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def read(run: Path, rank: int) -> Heartbeat | None:
    """The file of a process; None if there is none that can be read."""
    try:
        told: dict[str, Any] = json.loads(
            (run / FOLDER / f"{rank:05d}.json").read_text(encoding="utf-8")
        )
        return Heartbeat(**told)
    except (OSError, ValueError, TypeError):
        return None


def none_works(run: Path, rank: int, world: int, seconds: float) -> bool:
    """Whether every other process has waited in an agreement for so long, or has ended, is gone or silent for so long.

    Process `rank`, which waits itself, would then wait for ever: a link is cut, or a process dead. False where one has
    never written, as on machines that share no run folder.
    """
    beats = [read(run, other) for other in range(world) if other != rank]
    silence = max(seconds, 3 * interval(world) + 2)
    return all(
        beat is not None
        and (
            beat.waits > seconds
            or beat.phase == "ended"
            or time.time() - beat.time > silence
            or (beat.host == socket.gethostname() and not _is_alive(beat.pid))
        )
        for beat in beats
    )


def missing(run: Path, rank: int, world: int) -> str:
    """Whom process `rank` waits for, in words: who ended, is gone, is silent, or is furthest behind."""
    now, silence = time.time(), 3 * interval(world) + 2
    ended, gone, silent, others = [], [], [], []
    for other in range(world):
        beat = read(run, other)
        if other == rank:
            continue
        if beat is None:
            silent.append(f"process {other} never wrote to {run / FOLDER}")
            continue
        who = f"process {other} (pid {beat.pid} on {beat.host})"
        where = f"step {beat.step}, {beat.phase}"
        if beat.phase == "ended":
            ended.append(f"{who} ended at step {beat.step}: {beat.words}")
        elif beat.host == socket.gethostname() and not _is_alive(beat.pid):
            gone.append(f"{who} is gone; it was last heard of at {where}")
        elif now - beat.time > silence:
            silent.append(f"{who} is silent since {now - beat.time:.0f} s; it was at {where}")
        else:
            others.append((beat.step, f"{who} is at {where}"))
    found = ended or gone or silent or [words for _, words in sorted(others)]
    return "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _is_alive(pid: int) -> bool:
    """Of this host. A zombie, which its launcher has not buried yet, is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Path("/proc/self").exists() is False
    return state not in "ZX"
