"""Checkpoints that are whole or absent: written aside, verified, committed by one rename.

    run/checkpoints/step-00000200/   state/ (the engine's own files)  model.safetensors  ema.safetensors  manifest.json

A folder without a manifest whose sizes and checksums match does not exist for us. The state folder is read back only
from a run folder of one's own: DeepSpeed's files are pickles. To share weights, share the safetensors.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from speed_engine.atomic_files import sync, write_json, write_text
from speed_engine.distributed import Processes
from speed_engine.training import sealed

MANIFEST = "manifest.json"
WEIGHTS = ("model.safetensors", "ema.safetensors")  # beside the engine's own files, in state/
NAME = re.compile(r"step-(\d{8})")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run; the text says which and what to do."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    step: int
    folder: Path
    manifest: dict[str, Any]


def lock(run: Path) -> IO[str]:
    """Hold the run folder for this run; the lock ends with the process, however it ends.

    Raises CheckpointError if another run holds it.
    """
    file = (run / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise CheckpointError(
            f"{run} is in use by {holder}; wait for it to end, or choose another run_dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def save(
    run: Path,
    step: int,
    processes: Processes,
    write: Callable[[Path], None],
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Commit a checkpoint. `write(folder)` puts this process's files into it. Collective.

    Raises OSError or CheckpointError on every process if any process fails; the previous
    checkpoints are then untouched.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    failure: Exception | None = None
    if processes.first:
        failure = _attempt(lambda: _make_empty(partial))
    _raise_if_any(processes, failure, folder)
    failure = _attempt(lambda: write(partial))
    _raise_if_any(processes, failure, folder)
    if processes.first:
        failure = _attempt(lambda: _commit(partial, folder, step, facts))
    _raise_if_any(processes, failure, folder)
    if processes.first:
        for path in prune(run, keep, step):
            print(f"WARNING: {path} is not needed any more and cannot be deleted", flush=True)
    return folder


def _attempt(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except (OSError, ValueError, RuntimeError) as error:
        return error
    return None


def _raise_if_any(processes: Processes, failure: Exception | None, folder: Path) -> None:
    """Every process learns of a failure on any, so that none waits for ever."""
    if processes.any(failure is not None):
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: "
            f"{failure or 'another process failed'}; older checkpoints are intact"
        ) from failure


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _commit(partial: Path, folder: Path, step: int, facts: dict[str, Any]) -> None:
    """Make the files durable, write the manifest last, rename."""
    files = _files(partial)
    entries = {}
    for name, path in files.items():
        sync(path)
        entries[name] = {"bytes": path.stat().st_size, "crc32": _crc(path)}
    write_json(partial / MANIFEST, sealed.seal({"step": step, **facts, "files": entries}))
    for inner in {p.parent for p in files.values()} | {partial}:
        sync(inner)
    if folder.exists():  # the same step again, after a resume that chose an older one
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.parent)
    write_text(folder.parent / "latest", folder.name)


def prune(run: Path, keep: int, committed: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints up to the step `committed`, every abandoned partial folder, and
    what lies behind `committed` and is damaged: a resume passed it over. Returns what could not be deleted."""
    folders = sorted(_folders(run))
    done = [path for path in folders if step_of(path) <= committed]
    useless = done[:-keep] + [p for p in folders if step_of(p) > committed and not _is_sound(p)]
    useless += (run / "checkpoints").glob("step-*.partial")
    for path in useless:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in useless if path.exists()]


def _is_sound(folder: Path) -> bool:
    try:
        verified(folder)
    except CheckpointError:
        return False
    return True


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    name = NAME.fullmatch(folder.name)
    assert name is not None
    return int(name[1])


def _folders(run: Path) -> list[Path]:
    root = run / "checkpoints"
    return [p for p in root.iterdir() if NAME.fullmatch(p.name)] if root.is_dir() else []


def newest(run: Path, warn: Callable[[str], None]) -> Found | None:
    """The newest checkpoint that verifies; damaged ones are named through `warn` and passed over.

    None if there is none at all. Raises CheckpointError if all that exist are damaged.
    """
    folders = sorted(_folders(run), reverse=True)
    for folder in folders:
        try:
            return verified(folder)
        except CheckpointError as error:
            warn(f"{error}; trying the one before it")
    if folders:
        raise CheckpointError(
            f"no checkpoint in {run / 'checkpoints'} is usable; "
            "remove the folder to train from the start, or choose another run_dir"
        )
    return None


def verified(folder: Path) -> Found:
    """Check a checkpoint's files against its manifest. Raises CheckpointError naming the file."""
    try:
        manifest = sealed.read(folder / MANIFEST)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from error
    except sealed.Damaged as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error
    step, entries = step_of(folder), _entries(folder, manifest)
    if manifest.get("step") != step or isinstance(manifest["step"], bool):
        raise CheckpointError(
            f"{folder} is not the checkpoint of step {step}: its manifest says {manifest.get('step')!r}"
        )
    for name, (size, crc) in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {folder} lacks its file {name}")
        if path.stat().st_size != size or _crc(path) != crc:
            raise CheckpointError(f"the file {name} of the checkpoint {folder} is damaged")
    strange = _files(folder).keys() - entries.keys() - {MANIFEST}
    if strange:
        raise CheckpointError(
            f"the checkpoint {folder} holds {min(strange)}, which its manifest does not list; remove that file"
        )
    return Found(step, folder, manifest)


def _entries(folder: Path, manifest: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Name -> (bytes, CRC32) of the files that the manifest lists. Raises CheckpointError."""
    entries = {}
    listed = manifest.get("files")
    for name, entry in listed.items() if isinstance(listed, dict) else ():
        numbers = (entry.get("bytes"), entry.get("crc32")) if isinstance(entry, dict) else ()
        path = PurePosixPath(name)
        inside = not path.is_absolute() and ".." not in path.parts and str(path) == name
        if not inside or len(numbers) != 2 or any(type(n) is not int for n in numbers):
            raise CheckpointError(f"{folder / MANIFEST} is damaged: its entry {name!r} is none")
        entries[name] = numbers
    missing = [name for name in WEIGHTS if name not in entries]
    if not any(name.startswith("state/") for name in entries):
        missing.append("state/")
    if missing:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: its list of files lacks {', '.join(missing)}"
        )
    return entries


def _files(folder: Path) -> dict[str, Path]:
    """Every file below a folder, by its name from there."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every value in which two nested mappings differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
