"""Builds a set of shards so that a killed process leaves either nothing, or something it continues
from.

All work happens in `.<name>.partial` beside the final folder. A shard is written to a temporary
name, fsynced, scanned by the same code that checks foreign shards, renamed, and only then noted in
`progress.json`. At the end the index is written and the whole folder is renamed. The tars are
bit-identical from run to run: fixed time stamps, fixed owners, sorted members. This is the only
file that imports webdataset.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from speed_engine.atomic_files import sync, write_json, write_text

from .. import DataError
from . import index as index_file
from .index import Index, compose, index_shard
from .scaling import Scale
from .scan import Scanned

PLAN, PROGRESS, SKIPPED = "encode.json", "progress.json", "skipped.json"


class Skipped(BaseModel):
    """One source file that did not become a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str
    reason: str


class _Progress(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    position: int = 0
    shards: list[Scanned] = []
    skipped: list[Skipped] = []


class SetWriter:
    """Writes one set into `out`. Use it as a context manager; it holds a lock against a second
    writer.

    plan: JSON values that say what the set is made from; they are kept in `encode.json`, and only a
    set or an interrupted set of the same plan is taken for the same. Raises DataError where `out`
    holds something else. After entering: `finished` is the index of a set that is there already, or
    None; `position` is the number of source items that an interrupted run has dealt with; `room` is
    the number of samples until the shard is full.
    """

    def __init__(
        self,
        out: Path,
        plan: dict[str, Any],
        *,
        shard_size: int,
        posterior: bool = False,
        wait: bool = False,
    ):
        if shard_size < 1:
            raise DataError("--shard-size must be at least 1")
        self.out = Path(os.path.realpath(out))
        self.partial = self.out.with_name(f".{self.out.name}.partial")
        self.plan = json.loads(json.dumps(plan))
        self.shard_size, self.posterior, self.wait = shard_size, posterior, wait
        self.finished: Index | None = None
        self.position = 0
        self.shards: list[Scanned] = []
        self.skipped: list[Skipped] = []
        self._lock: IO[str] | None = None
        self._file: IO[bytes] | None = None
        self._tar: Any = None
        self._in_shard = 0

    def __enter__(self) -> SetWriter:
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
        with contextlib.suppress(OSError):  # an unfinished shard is thrown away in any case
            if self._tar is not None:
                self._tar.close()
            if self._file is not None:
                self._file.close()
        assert self._lock is not None
        self._lock.close()

    @property
    def room(self) -> int:
        return self.shard_size - self._in_shard

    @property
    def num_written(self) -> int:
        return sum(s.shard.count for s in self.shards) + self._in_shard

    def write(
        self,
        position: int,
        array: np.ndarray,
        label: int | None,
        flipped: np.ndarray | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add one sample, array (C, *space). position: source items dealt with, this one included.
        arrays: what lies beside it, by name."""
        if self._tar is None:
            self._tar = self._start_shard()
        sample: dict[str, Any] = {
            "__key__": f"{self.num_written:09d}",
            "npy": np.ascontiguousarray(array),
        }
        if label is not None:
            sample["cls"] = label
        if flipped is not None:
            sample["flipped.npy"] = np.ascontiguousarray(flipped)
        for name, named in (arrays or {}).items():
            sample[f"{name}.npy"] = np.ascontiguousarray(named).reshape(named.shape)
        self._tar.write(sample)
        self._in_shard += 1
        self.position = position
        if not self.room:
            self._end_shard()

    def skip(self, file: str, reason: str) -> None:
        """Note a source item that gives no sample; it counts as dealt with at the next `write`."""
        self.skipped.append(Skipped(file=file, reason=reason))

    def finish(
        self,
        class_names: Sequence[str] = (),
        scale: Scale | None = None,
        shift: Scale | None = None,
        vae: str | None = None,
    ) -> Index:
        """Write the index (see `compose`) and give the set its name. Raises DataError when there is no sample."""
        if self._tar is not None:
            self._end_shard()
        if not self.shards:
            reasons = ""
            if self.skipped:
                first = self.skipped[0]
                reasons = f"; skipped {len(self.skipped)}, the first: {first.file}: {first.reason}"
            shutil.rmtree(self.partial)
            raise DataError(f"there is no image to write{reasons}")
        index = compose(
            self.shards,
            scale=scale,
            shift=shift,
            posterior=self.posterior,
            class_names=class_names,
            vae=vae,
        )
        skipped = [item.model_dump() for item in self.skipped]
        write_json(self.partial / SKIPPED, skipped)
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
        if not self._same_plan(self.partial) and not (self.partial / PROGRESS).exists():
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
        self._resume()

    def _same_plan(self, folder: Path) -> bool:
        try:
            return json.loads((folder / PLAN).read_text()) == self.plan
        except (OSError, ValueError):
            return False

    def _resume(self) -> None:
        path = self.partial / PROGRESS
        try:
            progress = (
                _Progress.model_validate_json(path.read_bytes()) if path.exists() else _Progress()
            )
        except ValidationError:
            raise DataError(f"{path} is damaged; remove {self.partial} and start again") from None
        self.position, self.shards = progress.position, list(progress.shards)
        self.skipped = list(progress.skipped)
        known = {PLAN, PROGRESS}
        for scanned in self.shards:
            tar = Path(scanned.shard.name)
            known |= {tar.name, index_file.entries_path(tar).name}
            if (self.partial / tar).stat().st_size != scanned.shard.bytes:
                raise DataError(
                    f"{self.partial / tar} has changed; remove {self.partial} and start again"
                )
        for stray in self.partial.iterdir():
            if stray.name not in known:
                stray.unlink()

    def _start_shard(self) -> Any:
        from webdataset.writer import TarWriter

        self._file = open(self.partial / "shard.tar.tmp", "wb")  # noqa: SIM115  closed in _end_shard
        self._in_shard = 0
        return TarWriter(self._file, mtime=0, user="", group="")

    def _end_shard(self) -> None:
        assert self._file is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._tar = self._file = None
        self._in_shard = 0
        path = self.partial / f"shard-{len(self.shards):06d}.tar"
        os.replace(self.partial / "shard.tar.tmp", path)
        self.shards.append(index_shard(path, self.posterior))
        progress = _Progress(position=self.position, shards=self.shards, skipped=self.skipped)
        write_text(self.partial / PROGRESS, progress.model_dump_json())

    def _publish(self) -> None:
        (self.partial / PROGRESS).unlink(missing_ok=True)
        sync(self.partial)
        os.rename(self.partial, self.out)  # an empty folder may be in the way, nothing else
        sync(self.out.parent)
