"""Builds a set of shards so that killed processes leave either nothing, or something that others continue from.

All work happens in `.<name>.partial` beside the final folder. Shard k holds what the source items from k * S to
(k + 1) * S - 1 give, whoever writes it, and leaves a note when it is whole (`shard_writer`); any number of processes
may share the shards, and another number may go on. At the end one writes the index and renames the whole folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from speed_engine.atomic_files import sync, write_json

from .. import DataError
from . import index as index_file
from .index import Index, StoredCondition, compose
from .scaling import Scale
from .shard_writer import Note, ShardWriter, Skipped, notes, remove_strays

PLAN, SKIPPED = "encode.json", "skipped.json"
OLD_PROGRESS = "progress.json"  # of the first version, which wrote its shards one after the other


class SetWriter:
    """Writes one set into `out`. Use it as a context manager; it holds a lock against a second
    writer.

    plan: JSON values that say what the set is made from; they are kept in `encode.json`, and only a
    set or an interrupted set of the same plan is taken for the same. helper: one of several
    processes, not the one that holds the lock; it calls `join` when the other one is inside, and
    never `finish`. Raises DataError where `out` holds something else. After entering: `finished` is
    the index of a set that is there already, or None; `position` is the number of source items,
    from the first on, that an interrupted run has dealt with.
    """

    def __init__(
        self,
        out: Path,
        plan: dict[str, Any],
        *,
        shard_size: int,
        posterior: bool = False,
        wait: bool = False,
        helper: bool = False,
    ):
        if shard_size < 1:
            raise DataError("--shard-size must be at least 1")
        self.out = Path(os.path.realpath(out))
        self.partial = self.out.with_name(f".{self.out.name}.partial")
        self.plan = json.loads(json.dumps(plan))
        self.shard_size, self.posterior = shard_size, posterior
        self.wait, self.helper = wait, helper
        self.finished: Index | None = None
        self.skipped: list[Skipped] = []
        self.notes: dict[int, Note] = {}
        self._lock: IO[str] | None = None
        self._shard: ShardWriter | None = None

    def __enter__(self) -> SetWriter:
        if self.helper:
            return self
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            lock = open(self.out.with_name(f".{self.out.name}.lock"), "w")
        except OSError as error:
            raise DataError(
                f"{self.out.parent} cannot be written ({error.strerror}); choose another folder"
            ) from None
        self._lock = lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if self.wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise DataError(f"another process is writing {self.out}; wait for it") from None
        except OSError as error:
            lock.close()
            raise DataError(
                f"{self.out.parent} knows no file locks ({error.strerror}); choose another folder"
            ) from None
        try:
            self._open()
        except BaseException:
            lock.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shard is not None:
            self._shard.__exit__(kind, error, trace)
        if self._lock is not None:
            self._lock.close()

    def join(self) -> None:
        """See what is there, as a helper. Raises DataError where this folder is not the other process's."""
        if self._same_plan(self.partial):
            self.notes = notes(self.partial)
        elif self._same_plan(self.out):
            self.finished = index_file.load(self.out)
        else:
            raise DataError(
                f"{self.partial} is not there or not the same set on this machine; give --out a folder that all "
                "processes see"
            )

    @property
    def position(self) -> int:
        return self.shard_size * next(k for k in range(len(self.notes) + 1) if k not in self.notes)

    def missing(self, count: int) -> list[int]:
        """The shards of a source of `count` items that are still to be written."""
        return [k for k in range(-(-count // self.shard_size)) if k not in self.notes]

    def items(self, shard: int, count: int) -> range:
        """The source items, of `count`, that belong to a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, count))

    def shard(self, number: int) -> ShardWriter:
        """The writer of one missing shard: enter it, write, `close` it."""
        return ShardWriter(self.partial, number, self.posterior)

    def write(
        self,
        position: int,
        array: np.ndarray,
        label: int | None,
        flipped: np.ndarray | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add one sample, array (C, *space), from a source that is written by one process, in order.
        position: source items dealt with, this one included. arrays: what lies beside it, by name."""
        number = (position - 1) // self.shard_size
        if self._shard is None or self._shard.number != number:
            self._end_shard()
            self._shard = self.shard(number)
        self._shard.write(position - 1, array, label, flipped, arrays)
        if position % self.shard_size == 0:
            self._end_shard()

    def skip(self, file: str, reason: str) -> None:
        """Note something in the source that is no item of it."""
        self.skipped.append(Skipped(file=file, reason=reason))

    def finish(
        self,
        class_names: Sequence[str] = (),
        scale: Scale | None = None,
        shift: Scale | None = None,
        vae: str | None = None,
        conditions: Mapping[str, StoredCondition] | None = None,
    ) -> Index:
        """Write the index (see `compose`) and give the set its name. Raises DataError when there is no sample.

        All shards must be there, whoever wrote them.
        """
        self._end_shard()
        self.notes = notes(self.partial)
        self.skipped += [each for k in sorted(self.notes) for each in self.notes[k].skipped]
        scanned = [note.scanned for _, note in sorted(self.notes.items()) if note.scanned]
        if not scanned:
            reasons = ""
            if self.skipped:
                first = self.skipped[0]
                reasons = f"; skipped {len(self.skipped)}, the first: {first.file}: {first.reason}"
            shutil.rmtree(self.partial)
            raise DataError(f"there is no image to write{reasons}")
        index = compose(
            scanned,
            scale=scale,
            shift=shift,
            posterior=self.posterior,
            class_names=class_names,
            vae=vae,
            conditions=conditions,
        )
        write_json(self.partial / SKIPPED, [item.model_dump() for item in self.skipped])
        index_file.save(index, self.partial)
        self._publish()
        return index

    def _open(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            if self._same_plan(self.out):
                self.finished = index_file.load(self.out)
                shutil.rmtree(self.partial, ignore_errors=True)
                return
            raise DataError(
                f"{self.out} is not empty and is not the same set; choose another folder (--out, or data.path of a "
                "run) or remove it"
            )
        if (self.partial / OLD_PROGRESS).exists():
            raise DataError(
                f"{self.partial} holds an interrupted run of an earlier version; remove it and start again"
            )
        if not self._same_plan(self.partial) and not any(self.partial.glob("shard-*.json")):
            # Never begun, or stopped before the first shard was whole: nothing is lost.
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            write_json(self.partial / PLAN, self.plan)
        elif not self._same_plan(self.partial):
            raise DataError(
                f"{self.partial} holds an interrupted run with other images or settings; repeat "
                "that command to finish it, or remove the folder"
            )
        elif (self.partial / index_file.INDEX).exists():  # killed between the index and the rename
            self.finished = index_file.load(self.partial)
            self._publish()
            return
        remove_strays(self.partial, {PLAN})
        self.notes = notes(self.partial)

    def _same_plan(self, folder: Path) -> bool:
        try:
            return json.loads((folder / PLAN).read_text()) == self.plan
        except (OSError, ValueError):
            return False

    def _end_shard(self) -> None:
        if self._shard is not None:
            self.notes[self._shard.number] = self._shard.close()
            self._shard = None

    def _publish(self) -> None:
        for path in self.partial.glob("shard-*.json"):
            path.unlink()
        sync(self.partial)
        os.rename(self.partial, self.out)  # an empty folder may be in the way, nothing else
        sync(self.out.parent)
