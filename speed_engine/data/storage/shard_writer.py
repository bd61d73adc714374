"""One shard of a set in the making, and the note that it leaves when it is whole.

A shard is written to a temporary name, fsynced, renamed, scanned by the same code that checks foreign shards, and only
then noted. What has no note does not count, so a process can be killed anywhere. The tars are bit-identical from run
to run: fixed time stamps, fixed owners, sorted members, and a sample's key is the number of its source item. This is
the only file that imports webdataset.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from speed_engine.atomic_files import write_text

from .. import DataError
from . import index as index_file
from .scan import Scanned

BLOCK, NPY_HEADER = 512, 128  # bytes of tar's unit, and of what numpy writes before an array


class Skipped(BaseModel):
    """One source file that did not become a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    file: str
    reason: str


class Note(BaseModel):
    """A finished shard; `scanned` is None where none of its source items gave a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scanned: Scanned | None = None
    skipped: list[Skipped] = []


def name_of(number: int) -> str:
    """Of shard `number`, without an ending."""
    return f"shard-{number:06d}"


def notes(folder: Path) -> dict[int, Note]:
    """The finished shards in `folder`, by number. Raises DataError for a damaged note or a shard that has changed."""
    found = {}
    for path in sorted(folder.glob("shard-*.json")):
        match = re.fullmatch(r"shard-([0-9]{6,})\.json", path.name)
        if match is None:
            continue
        try:
            note = Note.model_validate_json(path.read_bytes())
        except ValidationError:
            raise DataError(f"{path} is damaged; remove {folder} and start again") from None
        if note.scanned is not None:
            tar = folder / note.scanned.shard.name
            if not tar.is_file() or tar.stat().st_size != note.scanned.shard.bytes:
                raise DataError(f"{tar} has changed; remove {folder} and start again")
        found[int(match[1])] = note
    return found


def remove_strays(folder: Path, keep: set[str]) -> None:
    """Remove what killed processes left in `folder`: all that is not in `keep` and belongs to no finished shard."""
    known = set(keep)
    for number, note in notes(folder).items():
        known.add(f"{name_of(number)}.json")
        if note.scanned is not None:
            tar = Path(note.scanned.shard.name)
            known |= {tar.name, index_file.entries_path(tar).name}
    for stray in folder.iterdir():
        if stray.name not in known:
            stray.unlink()


def sample_bytes(*arrays: int, label: bool) -> int:
    """Bytes in a shard of a sample that has arrays of so many bytes each."""
    whole = sum(BLOCK + -(-(NPY_HEADER + each) // BLOCK) * BLOCK for each in arrays)
    return whole + 2 * BLOCK * label


class ShardWriter:
    """Writes shard `number` into `folder`; a context manager. `close` makes it count, leaving it before does not."""

    def __init__(self, folder: Path, number: int, posterior: bool) -> None:
        self.folder, self.number, self.posterior = folder, number, posterior
        self.count = 0
        self._skipped: list[Skipped] = []
        # A name of its own: a process that was given up may still be at work on the same shard.
        self._temporary = folder / f"{name_of(number)}.{uuid.uuid4().hex[:12]}.tmp"
        self._tar: Any = None
        self._file: Any = None

    def __enter__(self) -> ShardWriter:
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
        self._tar = self._file = None

    def write(
        self,
        item: int,
        array: np.ndarray,
        label: int | None,
        flipped: np.ndarray | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Add one sample, array (C, *space), made from the source item of this number."""
        if self._tar is None:
            from webdataset.writer import TarWriter

            self._file = open(self._temporary, "wb")  # noqa: SIM115  closed in close or __exit__
            self._tar = TarWriter(self._file, mtime=0, user="", group="")
        sample: dict[str, Any] = {"__key__": f"{item:09d}", "npy": np.ascontiguousarray(array)}
        if label is not None:
            sample["cls"] = label
        if flipped is not None:
            sample["flipped.npy"] = np.ascontiguousarray(flipped)
        for name, named in (arrays or {}).items():
            sample[f"{name}.npy"] = np.ascontiguousarray(named).reshape(named.shape)
        self._tar.write(sample)
        self.count += 1

    def skip(self, file: str, reason: str) -> None:
        """Note a source item that gives no sample."""
        self._skipped.append(Skipped(file=file, reason=reason))

    def close(self) -> Note:
        """Finish the shard: durable, scanned, noted. Raises DataError for a sample that cannot be stored."""
        scanned = None
        if self._tar is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._tar = self._file = None
            path = self.folder / f"{name_of(self.number)}.tar"
            os.replace(self._temporary, path)
            scanned = index_file.index_shard(path, self.posterior)
        note = Note(scanned=scanned, skipped=self._skipped)
        write_text(self.folder / f"{name_of(self.number)}.json", note.model_dump_json())
        return note
