"""What all encoders share: many processes write the shards of one set, each its own, and one of them tells how it goes.

Shard k is made by process k mod N of those that are there, from the same source items whatever N is, so the set is the
same, byte for byte, with any number of processes, also with another number after an interruption. The processes need no
network: see `distributed.meeting`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from speed_engine.data import DataError
from speed_engine.data.storage.index import Index, StoredCondition
from speed_engine.data.storage.scaling import Scale
from speed_engine.data.storage.writer import SetWriter
from speed_engine.distributed.launched import WHICH, place
from speed_engine.distributed.meeting import PATIENCE, Meeting, start_of
from speed_engine.errors import SaidElsewhere
from speed_engine.progress import Progress, progress, wrapped

FIRST_WORD, NEXT_WORD = 20.0, 300.0  # seconds until the speed is told where no bar shows it
REDRAW = 0.1  # seconds between two looks at all processes


@dataclass(frozen=True)
class Team:
    """The processes that write one set together: this one's rank of `world`, its place among the `neighbours` of its
    machine, the start that all belong to, and how many seconds a silent one is waited for."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    neighbours: int = 1
    start: str = ""
    patience: float = PATIENCE

    @property
    def first(self) -> bool:
        return self.rank == 0

    def cores(self) -> int:
        """Processors that this process may keep busy."""
        return max(1, len(os.sched_getaffinity(0)) // self.neighbours)


ALONE = Team()


@contextmanager
def told_by_first(team: Team) -> Iterator[None]:
    """For what all find wrong alike, in their arguments: the first process raises it, the others SaidElsewhere."""
    try:
        yield
    except DataError:
        if team.first:
            raise
        raise SaidElsewhere from None


def team_of(environment: Mapping[str, str], patience: float = PATIENCE) -> Team:
    """As a launcher has put this process (torchrun, deepspeed, srun). Raises ValueError for a half-told place."""
    told = place(environment, WHICH)
    if told is None:
        return Team(patience=patience)
    start = start_of(environment, told.world)
    return Team(told.rank, told.world, told.local_rank, told.neighbours, start, patience)


class Sample(NamedTuple):
    """What one source item gives: the arrays of `SetWriter.write`."""

    item: int
    x: np.ndarray
    label: int | None
    flipped: np.ndarray | None = None
    arrays: Mapping[str, np.ndarray] = {}


class Fault(NamedTuple):
    """A source item that gives no sample, and why."""

    item: int
    file: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A source that is ready to be read. items: what the source items of a range give, in their order, one by one.

    said: a line about what will be written. sample_bytes: of one sample in a shard. others: (file, reason) of what is
    no item. class_names, scale, shift, vae, conditions: for the index.
    """

    items: Callable[[range], Iterator[Sample | Fault]]
    said: str
    sample_bytes: int
    class_names: Sequence[str] = ()
    scale: Scale | None = None
    shift: Scale | None = None
    vae: str | None = None
    others: Sequence[tuple[str, str]] = ()
    conditions: Mapping[str, StoredCondition] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A set to be written. plan: what it is made from (`SetWriter`). count: source items. unit: what they are called.

    open: makes ready what only the work needs (an autoencoder); may raise DataError.
    """

    plan: dict[str, Any]
    count: int
    shard_size: int
    open: Callable[[], Source]
    posterior: bool = False
    unit: str = "images"


def write_set(
    out: Path,
    prepare: Callable[[], Job],
    *,
    console: Console | None = None,
    team: Team = ALONE,
) -> Index | None:
    """Write the set that `prepare` finds into `out`: its index on the first process, None on the others.

    A set that is there already is left alone. Raises DataError and ValueError; of several processes one raises it, and
    the others SaidElsewhere.
    """
    console = (console if team.first else None) or Console(quiet=True)
    out = Path(os.path.realpath(out))
    folder = out.with_name(f".{out.name}.meeting") / team.start
    with Meeting(folder, team.rank, team.world, team.patience) as meeting:
        job = prepare()
        kind = {"shard_size": job.shard_size, "posterior": job.posterior}
        with SetWriter(out, job.plan, **kind, helper=not team.first) as writer:
            agreed = json.dumps([job.plan, job.count, kind], sort_keys=True)
            meeting.meet(hashlib.sha256(agreed.encode()).hexdigest())
            if not team.first:
                writer.join()
            if writer.finished is not None:
                console.print(f"already there: {writer.finished.count} samples in {out}")
                return writer.finished
            source = job.open()
            missing = writer.missing(job.count)
            left = sum(len(writer.items(shard, job.count)) for shard in missing)
            if left < job.count:
                console.print(f"continuing after {job.count - left} of {job.count} {job.unit}")
            planned = -(-job.count // job.shard_size)
            console.print(wrapped(f"{source.said}{_together(planned, team)}"))
            if note := _room(out.parent, left * source.sample_bytes):
                console.print(wrapped(f"note: {note}"))
            with progress("encode", job.count, job.count - left, console, team.first) as bar:
                told = _Told(console, bar, meeting, job, left, team.world)
                for shard in missing:
                    if shard % team.world == team.rank:
                        _write_shard(writer, shard, source, job.count, meeting, told)
                if not team.first:
                    return None
                meeting.wait_for_others(told.at_times)
            for file, reason in source.others:
                writer.skip(file, reason)
            index = writer.finish(
                source.class_names, source.scale, source.shift, source.vae, source.conditions
            )
    shards = counted(len(index.shards), "shard")
    rate = f"{told.rate():.0f} {job.unit}/s"
    console.print(wrapped(f"{counted(index.count, 'sample')} in {shards} in {out} ({rate})"))
    if writer.skipped:
        skipped = counted(len(writer.skipped), "file")
        console.print(wrapped(f"{skipped} skipped, listed in {out}/skipped.json"))
    return index


def _write_shard(
    writer: SetWriter, number: int, source: Source, count: int, meeting: Meeting, told: _Told
) -> None:
    with writer.shard(number) as shard:
        for one in source.items(writer.items(number, count)):
            if isinstance(one, Fault):
                shard.skip(one.file, one.reason)
            else:
                shard.write(one.item, one.x, one.label, one.flipped, one.arrays)
            meeting.done += 1
            meeting.check()
            told.at_times()
        shard.close()


@dataclass
class _Told:
    """Tells how the work of all processes goes: the bar where there is a terminal, a line at times where not."""

    console: Console
    bar: Progress
    meeting: Meeting
    job: Job
    left: int
    world: int
    started: float = field(default_factory=time.monotonic)
    last: float = 0.0
    next_word: float = field(default_factory=lambda: FIRST_WORD)

    def rate(self) -> float:
        return self.meeting.done_by_all() / max(time.monotonic() - self.started, 1e-9)

    def at_times(self) -> None:
        since = time.monotonic() - self.started
        if self.console.quiet or since < self.last + REDRAW:
            return
        self.last = since
        done, rate = self.meeting.done_by_all(), self.rate()
        self.bar.at(self.job.count - self.left + done)
        self.bar.say(f"{rate:.0f} {self.job.unit}/s")
        if since < self.next_word or not done:
            return
        self.next_word = since + NEXT_WORD
        if not self.console.is_terminal:
            many = f" by {self.world} processes" if self.world > 1 else ""
            self.console.print(
                f"{self.job.count - self.left + done} of {self.job.count} {self.job.unit}, {rate:.0f} {self.job.unit}/s"
                f"{many}; about {duration((self.left - done) / rate)} left"
            )


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(num_bytes: float) -> str:
    """`812 kB`, `3.4 GB`: powers of ten, as disks are sold."""
    for unit, each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= each:
            return f"{num_bytes / each:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def counted(number: int, thing: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _together(shards: int, team: Team) -> str:
    many = f", {team.world} processes" if team.world > 1 else ""
    return f"; {counted(shards, 'shard')}{many}"


def _room(folder: Path, needed: float) -> str | None:
    """A sentence where the disk is too small for what is to come."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"{folder} cannot be looked at ({error.strerror})") from None
    if free >= needed:
        return None
    return f"about {size(needed)} are to be written, and {folder} has {size(free)} left"
