"""Checkpoints that are whole or absent: written aside, verified, committed by one rename.

    run/checkpoints/step-00000200/   state/ (the engine's own files)  model.safetensors  ema.safetensors  manifest.json

A folder without a manifest whose sizes and checksums match does not exist for us. The state folder is read back only
from a run folder of one's own: DeepSpeed's files are pickles. To share weights, share the safetensors.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from speed_engine.atomic_files import sync, write_json, write_text
from speed_engine.distributed import Processes

MANIFEST = "manifest.json"
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
        prune(run, keep)
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
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    entries = {}
    for path in files:
        sync(path)
        entries[str(path.relative_to(partial))] = {
            "bytes": path.stat().st_size,
            "crc32": _crc(path),
        }
    write_json(partial / MANIFEST, {"step": step, **facts, "files": entries})
    for inner in {p.parent for p in files} | {partial}:
        sync(inner)
    if folder.exists():  # the same step again, after a resume that chose an older one
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.parent)
    write_text(folder.parent / "latest", folder.name)


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and every abandoned partial folder."""
    folders = sorted(p for p in _folders(run) if p.name.startswith("step-"))
    for path in folders[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in (run / "checkpoints").glob("step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


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
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = dict(manifest["files"])
        step = int(manifest["step"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {folder} lacks its file {name}")
        if path.stat().st_size != entry["bytes"] or _crc(path) != entry["crc32"]:
            raise CheckpointError(f"the file {name} of the checkpoint {folder} is damaged")
    return Found(step, folder, manifest)


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
