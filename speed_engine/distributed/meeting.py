"""Processes that share a piece of work for hours and agree through files, so that they need no network.

Each keeps a record of its own in a folder that all of them see, and renews it. A record that does not change any more
is that of a process that died; clocks are never compared, and what an earlier start has left behind never changes. The
first process takes in those that it sees alive, by a word of their own, and watches them; it gives the one verdict:
why all end, and who says so. The others watch the first one alone, so that one process in all reads all the records.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType

from speed_engine.atomic_files import write_text
from speed_engine.errors import SaidElsewhere

PATIENCE = 120.0  # seconds; a network file system may show a change a minute late
# What tells one start of many processes from another.
STARTS = (
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID"),
)


@dataclass(frozen=True)
class Verdict:
    """Why all end. teller: the process whose own sentence is told."""

    teller: int
    text: str


@dataclass(frozen=True)
class Record:
    """What a process says of itself. word: its own, new at each start. beat: grows while it lives.

    state: preparing, ready, working, done, failed, or over: it knows why all end. agreed: what all must have the same.
    done: units of work, since the start. Of the first process alone: taken, the words of the others by rank; verdict.
    """

    word: str
    rank: int
    host: str
    beat: int = 0
    state: str = "preparing"
    agreed: str = ""
    done: int = 0
    taken: dict[str, str] = field(default_factory=dict)
    verdict: Verdict | None = None


def start_of(environment: Mapping[str, str], world: int) -> str:
    """A name for the start that this process belongs to: the same for all of its processes."""
    told = [str(world), *(environment.get(name, "") for name in STARTS)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


class Meeting:
    """One process's seat; a context manager. `folder`: seen by all, used by this start alone.

    An exception that leaves the block ends all: the one process whose failure is told raises its own, the others
    SaidElsewhere. patience: seconds without a sign of life after which a process counts as dead. With world = 1 nothing
    is written, and nothing happens.
    """

    def __init__(self, folder: Path, rank: int, world: int, patience: float = PATIENCE) -> None:
        self.folder, self.rank, self.world, self.patience = folder, rank, world, patience
        self.beat = min(1.0, patience / 50)
        self.done = 0
        self._own = Record(uuid.uuid4().hex[:12], rank, socket.gethostname())
        self._others: dict[
            int, Record
        ] = {}  # as last seen: all for the first, the first for others
        self._changed: dict[int, float] = {}  # when they last changed, by our clock
        self._before: set[str] = set()  # words that were there before this process
        self._verdict: Verdict | None = None
        self._missed = False  # another one did not come
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live, name="meeting", daemon=True)

    def __enter__(self) -> Meeting:
        if self.world > 1:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._before = {record.word for record in self._all()}
                self._say()
            except OSError as error:
                text = f"{self.folder.parent.parent} cannot be written ({error.strerror}); choose another folder"
                # Where it is another process alone that cannot, the first one will miss it.
                raise (ValueError if self.rank == 0 else SaidElsewhere)(text) from None
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.world == 1:
            return
        try:
            if error is None:
                self._leave()
            elif not isinstance(error, Exception):  # interrupted: no time to wait for anybody
                self._end(Verdict(self.rank, "interrupted"))
            else:
                if self._verdict is None:
                    self._fail()
                self._part()
                elsewhere = self._verdict is not None and self._verdict.teller != self.rank
                if elsewhere and not isinstance(error, SaidElsewhere):
                    raise SaidElsewhere from error
        finally:
            self._over.set()
            self._thread.join()

    def meet(self, agreed: str) -> None:
        """Wait until all are here. agreed: what must be the same everywhere. Raises ValueError, or SaidElsewhere."""
        if self.world == 1:
            return
        self._say(state="ready", agreed=agreed)
        if self.rank == 0:
            self._gather()
            failed = [rank for rank, each in sorted(self._others.items()) if each.state == "failed"]
            if failed:
                self._end(Verdict(failed[0], "failed"))
            other = [rank for rank, each in sorted(self._others.items()) if each.agreed != agreed]
            if other and not failed:
                host = self._others[other[0]].host
                self._end(
                    Verdict(
                        0,
                        f"process {other[0]} (on {host}) was given other data or settings than process 0; start all "
                        "with the same command, on data that is the same everywhere",
                    )
                )
        else:
            self._wait_for_the_first()
            while self._verdict is None and self._others[0].state != "working":
                time.sleep(self.beat)
        self.check()
        self._say(state="working")

    def check(self) -> None:
        """Cheap. Raises ValueError where this process is to tell why all end, SaidElsewhere where another is."""
        if self._verdict is None:
            return
        if self._verdict.teller == self.rank:
            raise ValueError(self._verdict.text)
        raise SaidElsewhere(f"process {self._verdict.teller} {self._verdict.text}")

    def done_by_all(self) -> int:
        """Units of work done since the start; of all processes on the first one, else its own."""
        others = self._others.values() if self.rank == 0 else ()
        return self.done + sum(each.done for each in others)

    def wait_for_others(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """On the first process: until all others are done. Raises as `check` does."""
        while any(each.state != "done" for each in self._others.values()):
            self.check()
            meanwhile()
            time.sleep(self.beat)

    # --------------------------------------------------------------------------------- records

    def _say(self, **news: object) -> None:
        with self._lock:
            self._own = replace(self._own, beat=self._own.beat + 1, done=self.done, **news)  # type: ignore[arg-type]
            write_text(self._path(self._own.word, self.rank), json.dumps(asdict(self._own)))

    def _path(self, word: str, rank: int) -> Path:
        return self.folder / f"{rank}-{word}.json"

    def _read(self, path: Path) -> Record | None:
        """None for one that is gone, or not one of ours."""
        try:
            told = json.loads(path.read_text())
            verdict = Verdict(**told.pop("verdict")) if told.get("verdict") else None
            return Record(**{**told, "verdict": verdict})
        except (OSError, ValueError, TypeError):
            return None

    def _all(self) -> list[Record]:
        return [each for path in self.folder.glob("*-*.json") if (each := self._read(path))]

    # --------------------------------------------------------------------------------- meeting

    def _gather(self, prepared: bool = True) -> None:
        """The first process: take in a living record of each other one. prepared: wait until all are."""
        beats: dict[str, int] = {}
        found: dict[int, Record] = {}
        heard = dict.fromkeys(range(1, self.world), time.monotonic())
        while True:
            for record in self._all():
                first = record.word not in beats
                moved = record.beat != beats.setdefault(record.word, record.beat)
                beats[record.word] = record.beat
                # One that was there before us may be an earlier start's: it must move first.
                alive = moved or (first and record.word not in self._before)
                if record.rank in heard and alive:
                    found[record.rank] = record
                    heard[record.rank] = time.monotonic()
            late = [
                rank
                for rank in heard
                if rank not in found or (prepared and found[rank].state == "preparing")
            ]
            if not late:
                break
            for rank in late:
                if time.monotonic() - heard[rank] > self.patience:
                    self._take(found, beats.keys())
                    self._missed = True
                    where = f" (on {found[rank].host})" if rank in found else ""
                    raise ValueError(
                        f"process {rank}{where} of {self.world} was not heard of for {self.patience:g} s; all of them "
                        f"must see {self.folder.parent}, and run"
                    )
            time.sleep(self.beat)
        self._take(found, beats.keys())

    def _take(self, found: dict[int, Record], words: Iterable[str]) -> None:
        """Say who belongs to this start; of all `words`, the others are an earlier one's and go."""
        with self._lock:
            self._others = found
            self._changed = dict.fromkeys(found, time.monotonic())
        self._say(taken={str(rank): each.word for rank, each in found.items()})
        for word in {*words} - {each.word for each in found.values()} - {self._own.word}:
            for path in self.folder.glob(f"*-{word}.json"):
                path.unlink(missing_ok=True)

    def _wait_for_the_first(self) -> None:
        """Another process: until the first one has taken it in. Raises ValueError when there is none."""
        beats: dict[str, int] = {}
        heard = time.monotonic()
        while True:
            for path in self.folder.glob("0-*.json"):
                record = self._read(path)
                if record is None:
                    continue
                if record.taken.get(str(self.rank)) == self._own.word:
                    with self._lock:
                        self._others, self._changed = {0: record}, {0: time.monotonic()}
                    self._verdict = self._verdict or record.verdict
                    return
                if record.beat != beats.get(record.word, record.beat):
                    heard = time.monotonic()
                beats[record.word] = record.beat
            if time.monotonic() - heard > self.patience:
                self._missed = True
                raise ValueError(
                    f"process 0 of {self.world} was not heard of for {self.patience:g} s; all of them must see "
                    f"{self.folder.parent}, and run"
                )
            time.sleep(self.beat)

    # --------------------------------------------------------------------------------- life and end

    def _live(self) -> None:
        """The thread: show that this process lives, and see whether the others do."""
        while not self._over.wait(self.beat):
            with contextlib.suppress(OSError):  # of a moment; if it lasts, the others will notice
                self._say()
                self._watch()

    def _watch(self) -> None:
        for rank, last in list(self._others.items()):
            record = self._read(self._path(last.word, rank))
            if record is not None and record.beat != last.beat:
                with self._lock:
                    self._others[rank], self._changed[rank] = record, time.monotonic()
        if self._verdict is not None:
            return
        if self.rank:
            first = self._others.get(0)
            if first is not None and first.verdict is not None:
                self._verdict = first.verdict
            elif first is not None and time.monotonic() - self._changed[0] > self.patience:
                self._verdict = Verdict(self._lowest_alive(), self._dead(first))
            return
        failed = sorted(rank for rank, each in self._others.items() if each.state == "failed")
        silent = [
            each
            for rank, each in sorted(self._others.items())
            if each.state != "done" and time.monotonic() - self._changed[rank] > self.patience
        ]
        if failed:
            self._end(Verdict(failed[0], "failed"))
        elif silent:
            self._end(Verdict(0, self._dead(silent[0])))

    def _dead(self, record: Record) -> str:
        return (
            f"process {record.rank} (on {record.host}) was not heard of for {self.patience:g} s, so it is probably "
            "dead; the same command continues"
        )

    def _lowest_alive(self) -> int:
        """Of those that are not done, without the first: who tells that the first is dead."""
        taken = {int(rank): word for rank, word in self._others[0].taken.items()}
        beats: dict[int, int] = {}
        alive = {self.rank}
        for _ in range(8):
            for rank, word in taken.items():
                record = self._read(self._path(word, rank))
                if record is None or record.state in ("done", "failed"):
                    continue
                if record.state == "over" or record.beat != beats.setdefault(rank, record.beat):
                    alive.add(rank)
            time.sleep(self.beat)
            self._say()
        return min(alive)

    def _end(self, verdict: Verdict) -> None:
        self._verdict = verdict
        with contextlib.suppress(OSError):
            self._say(verdict=verdict, **({} if self.rank == 0 else {"state": "failed"}))

    def _fail(self) -> None:
        """This process has failed: see who tells."""
        if self.rank == 0:
            if not self._others and not self._missed:  # they must be taken in, to learn of it
                with contextlib.suppress(ValueError, OSError):
                    self._gather(prepared=False)
            self._end(Verdict(0, "failed"))
            return
        try:
            self._say(state="failed")
            if not self._others:
                if self._missed:
                    return
                self._wait_for_the_first()
            until = time.monotonic() + self.patience
            while self._verdict is None and time.monotonic() < until:
                time.sleep(self.beat)
        except (OSError, ValueError):
            return  # nobody is there to decide

    def _part(self) -> None:
        """All end. The first process removes the records when the others have seen why, if that takes but a moment.

        Who does not tell leaves after the one who does: a launcher ends all as soon as one has gone.
        """
        with contextlib.suppress(OSError):
            if self.rank:
                self._over.set()  # its record may be removed from now on
                self._thread.join()
                self._say(state="over")
            else:
                for _ in range(10):
                    if all(each.state in ("done", "over") for each in self._others.values()):
                        self._remove()
                        break
                    time.sleep(self.beat)
        if self._verdict is not None and self._verdict.teller != self.rank:
            time.sleep(min(2.0, 5 * self.beat))

    def _remove(self) -> None:
        self._over.set()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder of all starts, once nobody is left in it
            os.rmdir(self.folder.parent)

    def _leave(self) -> None:
        if self.rank == 0:
            self.wait_for_others()
            self._remove()
            return
        self._over.set()
        self._thread.join()
        self._say(state="done")
