"""Checkpoints that are whole or absent: written aside, verified, committed by one rename.

    run/checkpoints/step-00000200/   state/ (the engine's own files)  model.safetensors  ema.safetensors  manifest.json

A folder without a manifest whose sizes and checksums match does not exist for us. The state folder is read back only
from a run folder of one's own: DeepSpeed's files are pickles. To share weights, share the safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from speed_engine.atomic_files import sync, write_json, write_text
from speed_engine.distributed import Processes
from speed_engine.training import sealed

MANIFEST = "manifest.json"
WEIGHTS = ("model.safetensors", "ema.safetensors")  # beside the engine's own files, in state/
NAME = re.compile(r"step-(\d{8})")
PATIENCE = 5.0  # seconds until a network file system shows another machine what was written


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another run; the text says which and what to do."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    step: int
    folder: Path
    manifest: dict[str, Any]


def partial_folder(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it is committed."""
    return run / "checkpoints" / f"step-{step:08d}.partial"


def save(
    run: Path,
    step: int,
    processes: Processes,
    write: Callable[[Path], None],
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """`prepare` and `commit`. Collective."""
    prepare(run, step, processes)
    return commit(run, step, processes, write, facts, keep)


def prepare(run: Path, step: int, processes: Processes) -> None:
    """Make the empty folder that a checkpoint is written into. Collective; raises as `commit` does."""
    partial = partial_folder(run, step)
    _on_first(processes, lambda: _make_empty(partial), partial)


def commit(
    run: Path,
    step: int,
    processes: Processes,
    write: Callable[[Path], None],
    facts: dict[str, Any],
    keep: int,
    pin_every: int | None = None,
    size: int = 0,
) -> Path:
    """Commit a checkpoint. `write(folder)` puts this process's files, about `size` bytes, into it. Collective.

    keep, pin_every: see `prune`. `write` must not be collective.
    Raises CheckpointError if any process fails, on that one, and SaidElsewhere on the others; the previous checkpoints
    are then untouched.
    """
    partial = partial_folder(run, step)
    folder = partial.with_suffix("")
    total = int(processes.sum(torch.tensor(float(size), dtype=torch.float64)).item())
    _on_first(processes, lambda: _refuse_small_disk(partial, total), partial)
    _together(processes, lambda: write(partial), partial)
    _on_first(processes, lambda: _seal(partial, folder, step, facts), partial)
    if processes.first:
        for path in prune(run, keep, step, pin_every):
            print(f"WARNING: {path} is not needed any more and cannot be deleted", flush=True)
    return folder


def _on_first(processes: Processes, action: Callable[[], None], partial: Path) -> None:
    _together(processes, action if processes.first else lambda: None, partial)


def _together(processes: Processes, action: Callable[[], None], partial: Path) -> None:
    """Raise on all processes if the action fails on one; what was written until then takes no room any more."""
    failure = _failure_of(action, partial.with_suffix(""))
    if processes.any(failure is not None):
        if processes.first:
            shutil.rmtree(partial, ignore_errors=True)
        processes.end_together(failure)


def _failure_of(action: Callable[[], None], folder: Path) -> Exception | None:
    """What went wrong: a CheckpointError in one sentence, or a bug of ours as it is."""
    try:
        action()
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, RuntimeError, MemoryError)):
            return error
        result = CheckpointError(
            f"cannot write the checkpoint {folder}: {why_not_written(error, folder.parents[1])}; "
            "older checkpoints are intact"
        )
        result.__cause__ = error
        return result
    return None


def why_not_written(error: Exception, where: Path) -> str:
    """The reason why a writer failed. torch's says only that less was written than was to be."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return f"not enough memory ({text})"
    if not isinstance(error, OSError) and ("unexpected pos" in text or "Writer failed" in text):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(where).free
            return f"the file could not be written whole; {human(free)} are free there, or a limit was met"
    return text


def human(size: float) -> str:
    """Bytes for a person: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _refuse_small_disk(folder: Path, size: int) -> None:
    """Raises OSError where the disk has not the room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"it takes {human(size)}, and only {human(free)} are free; make room")


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _seal(partial: Path, folder: Path, step: int, facts: dict[str, Any]) -> None:
    """Make the files durable, write the manifest last, rename."""
    files = _files(partial)
    entries = {}
    for name, path in files.items():
        sync(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(partial / MANIFEST, sealed.seal({"step": step, **facts, "files": entries}))
    for inner in {p.parent for p in files.values()} | {partial}:
        sync(inner)
    if folder.exists():  # the same step again, after a resume that chose an older one
        shutil.rmtree(folder)
    partial.rename(folder)
    sync(folder.parent)
    write_text(folder.parent / "latest", folder.name)


def prune(run: Path, keep: int, committed: int, pin_every: int | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints up to the step `committed`, every abandoned partial folder, and
    what lies behind `committed` and is damaged: a resume passed it over. Those of the multiples of `pin_every` are
    neither counted nor deleted. Returns what could not be deleted."""
    folders = sorted(_folders(run))
    done = [path for path in folders if step_of(path) <= committed]
    if pin_every is not None:
        done = [path for path in done if step_of(path) % pin_every or step_of(path) == committed]
    useless = done[:-keep] + [p for p in folders if step_of(p) > committed and not _is_sound(p)]
    useless += (run / "checkpoints").glob("step-*.partial")
    for scrap in (run / "checkpoints").glob(".latest.*.partial"):
        scrap.unlink(missing_ok=True)
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


def agreed_newest(run: Path, warn: Callable[[str], None], processes: Processes) -> Found | None:
    """`newest`, `agreed`. Collective; raises as both do."""
    return agreed(lambda: newest(run, warn), processes)


def agreed(choose: Callable[[], Found | None], processes: Processes) -> Found | None:
    """What the first process chooses; every other one must see the same files. Collective.

    Raises CheckpointError, on one process (SaidElsewhere on the others), also where one sees another folder for as
    long as a network disk may take to show it what another machine wrote.
    """
    found = processes.attempt(lambda: choose() if processes.first else None)
    found = processes.from_first(found)

    def see() -> None:
        deadline = time.monotonic() + PATIENCE
        while found is not None and not processes.first and not _sees(found):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"process {processes.rank} does not see the checkpoint {found.folder} as process 0 does; "
                    "choose a run_dir that all machines share"
                )
            time.sleep(0.2)

    processes.attempt(see)
    return found


def _sees(found: Found) -> bool:
    """Whether a checkpoint that another process verified is what this one sees, file by file."""
    try:
        mine = sealed.read(found.folder / MANIFEST)
        sizes = {name: (found.folder / name).stat().st_size for name in mine["files"]}
        same = all(sizes[name] == entry["bytes"] for name, entry in mine["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return same and mine == found.manifest


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
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"the checkpoint {folder} lacks its file {name}")
        if path.stat().st_size != size or digest != _digest(path, digest):
            raise CheckpointError(f"the file {name} of the checkpoint {folder} is damaged")
    strange = _files(folder).keys() - entries.keys() - {MANIFEST}
    if strange:
        raise CheckpointError(
            f"the checkpoint {folder} holds {min(strange)}, which its manifest does not list; remove that file"
        )
    return Found(step, folder, manifest)


def _entries(folder: Path, manifest: dict[str, Any]) -> dict[str, tuple[int, int | str]]:
    """Name -> (bytes, SHA-256, or CRC32 of earlier versions) of the files of a manifest. Raises CheckpointError."""
    entries = {}
    listed = manifest.get("files")
    for name, entry in listed.items() if isinstance(listed, dict) else ():
        entry = entry if isinstance(entry, dict) else {}
        size, digest = entry.get("bytes"), entry.get("sha256", entry.get("crc32"))
        path = PurePosixPath(name)
        inside = not path.is_absolute() and ".." not in path.parts and str(path) == name
        if not inside or type(size) is not int or type(digest) not in (int, str):
            raise CheckpointError(f"{folder / MANIFEST} is damaged: its entry {name!r} is none")
        entries[name] = (size, digest)
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


def _digest(path: Path, like: int | str) -> int | str:
    return _sha256(path) if isinstance(like, str) else _crc32(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
