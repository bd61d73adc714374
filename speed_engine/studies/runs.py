"""The cells of a study as ordinary runs: several at a time, each a process of `python -m speed_engine train`.

A cell has beside its run folder `NAME/` a file `NAME.yaml` (its configuration), `NAME.log` (what it said), `NAME.lock`
(held while a process works on it) and, once it has ended, `NAME.json` (its curve). That last file appears whole or not
at all and is never written twice, so that whatever kills a study costs it no finished cell; a cell that was under way
continues from its own checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import speed_kernels
import torch
import yaml

from speed_engine.atomic_files import write_json, write_text
from speed_engine.progress import progress
from speed_engine.studies import commits
from speed_engine.studies.study import Cell, Study
from speed_engine.training import checkpoint, metrics_file, sealed
from speed_engine.training.loop import DONE, NOT_FINITE
from speed_engine.training.run_lock import RunLock

POLL_SECONDS = 0.3
LOCK = "lock"


class StudyError(ValueError):
    """A study cannot go on, told in one sentence."""


@dataclass
class Working:
    """A cell under way on one of the places."""

    cell: Cell
    place: int
    process: subprocess.Popen[bytes]


def claim(folder: Path, study: Study) -> Any:
    """The folder for this study: made, or found to hold the same one; returns the lock, to be kept.

    Raises StudyError for a folder of another study, CheckpointError where another compare works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said, path = study.model_dump(mode="json"), folder / "study.json"
    if not path.exists() and any(each.name != LOCK for each in folder.iterdir()):
        raise StudyError(f"{folder} holds something else than a study; choose another --out")
    held = RunLock(folder)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in {**before, **said} if before.get(key) != said.get(key)]
        if changed:
            raise StudyError(
                f"{folder} holds another study ({', '.join(changed)} differ); choose another --out, "
                "or go back to the old values"
            )
    else:
        write_json(path, said)
    return held


def train(study: Study, cells: Sequence[Cell], folder: Path, jobs: int | None) -> None:
    """Run every cell that has not ended yet, `jobs` at a time. Ctrl-C stops all with checkpoints.

    jobs: None = one a GPU, or one a CPU core. Raises StudyError where a cell fails for any reason but divergence; the
    others are stopped with checkpoints, and the same command continues.
    """
    open_cells = [cell for cell in cells if not result_path(folder, cell).exists()]
    devices = _devices()
    places = min(jobs or len(devices) or min(8, os.cpu_count() or 1), max(1, len(open_cells)))
    waiting, working, told = list(open_cells), list[Working](), False
    done, began = len(cells) - len(open_cells), time.monotonic()
    if done:
        print(f"{done} of {len(cells)} cells had ended already", flush=True)
    watched = sys.stderr.isatty()
    with progress("cells", len(cells), done, show=watched) as bar:
        try:
            while waiting or working:
                free = sorted(set(range(places)) - {one.place for one in working})
                for cell in list(waiting):
                    if free and (started := _start(cell, folder, free[0], places, devices)):
                        working.append(started)
                        waiting.remove(cell)
                        free.pop(0)
                if waiting and not working and not told:
                    told = True
                    print("waiting for cells that a killed compare left running", flush=True)
                time.sleep(POLL_SECONDS)
                for one in [each for each in working if each.process.poll() is not None]:
                    working.remove(one)
                    status = _finish(one, study, folder)
                    done += 1
                    bar.at(done)
                    rate = (time.monotonic() - began) / (done - len(cells) + len(open_cells))
                    minutes, seconds = divmod(round(rate * (len(cells) - done)), 60)
                    if not watched:
                        print(
                            f"{done}/{len(cells)} {one.cell.name} {status}  {minutes}:{seconds:02d} left",
                            flush=True,
                        )
        finally:
            _stop(working)


def result_path(folder: Path, cell: Cell) -> Path:
    """Where the curve of an ended cell lies."""
    return folder / f"{cell.name}.json"


def result_of(cell: Cell, study: Study, run: Path, diverged: bool) -> dict[str, Any]:
    """A cell's curve and facts from its run folder. Raises StudyError where the metric was never written.

    `seconds` are those of training as the log counts them, without the start of the process; `flops` those of forward
    and backward passes. A value that is not finite is null.
    """
    manifest = sealed.read(run / "manifest.json")
    curve: dict[str, list[float | None]] = {
        key: [] for key in ("steps", "images", "flops", "seconds", "values")
    }
    seconds, flops, images = 0.0, 0.0, 0
    for line in metrics_file.read(run / "metrics.jsonl"):
        if line.get("images_per_s"):
            spent = (line["images"] - images) / line["images_per_s"]
            images, seconds = line["images"], seconds + spent
            flops += line["tflops_per_device"] * 1e12 * manifest["processes"] * spent
        if study.metric in line:
            point = (line["step"], images, flops, seconds, metrics_file.finite(line[study.metric]))
            for key, value in zip(curve, point, strict=True):
                curve[key].append(value)
    if not curve["steps"] and not diverged:
        raise StudyError(
            f"the run {run} wrote no {study.metric!r} into its metrics.jsonl; choose another metric"
        )
    facts = {key: manifest[key] for key in ("device", "threads", "processes", "versions", "engine")}
    return {
        "setting": cell.setting,
        "method": cell.method,
        "seed": cell.seed,
        "status": "diverged" if diverged else "finished",
        "commit": commits.current(),
        "curve": curve,
        "config": manifest["config"],
        "data": manifest["data"]["fingerprint"],
        **facts,
    }


# ------------------------------------------------------------------------------------------------ one cell


def _start(cell: Cell, folder: Path, place: int, places: int, devices: list[str]) -> Working | None:
    """The cell's process, or None while one that a killed study left works on it."""
    run = folder / cell.name
    held = _claim(run)
    if held is None:
        return None
    tree = {**cell.tree, "run_dir": str(run)}
    tree["checkpoint"] = {"keep": 1, **(tree.get("checkpoint") or {})}
    config, log = run.with_name(f"{run.name}.yaml"), run.with_name(f"{run.name}.log")
    write_text(config, yaml.safe_dump(tree, sort_keys=False))
    environment = dict(os.environ)
    # A cell runs the same code as we do, however that was found.
    here = [str(Path(__file__).parents[2]), str(Path(speed_kernels.__path__[0]).parent)]
    environment["PYTHONPATH"] = os.pathsep.join(
        [*here, *filter(None, [environment.get("PYTHONPATH")])]
    )
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    else:
        cores = max(1, (os.cpu_count() or 1) // places)
        environment.setdefault("OMP_NUM_THREADS", str(cores))
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with held, log.open("ab") as output:
        process = subprocess.Popen(
            command(config),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            pass_fds=[held.fileno()],
        )
    return Working(cell, place, process)


def command(config: Path) -> list[str]:
    """What a person would type to train the cell."""
    return [sys.executable, "-m", "speed_engine", "train", "--config", str(config)]


def _finish(one: Working, study: Study, folder: Path) -> str:
    """Keep the cell's result; `finished` or `diverged`."""
    code, run = one.process.returncode, folder / one.cell.name
    if code not in (DONE, NOT_FINITE):
        raise StudyError(f"the cell {one.cell.name} failed: {_last_words(run, code)}")
    if code == DONE and not _complete(run, study.steps):
        raise StudyError(
            f"the cell {one.cell.name} was stopped before its end; the same command continues"
        )
    result = result_of(one.cell, study, run, diverged=code == NOT_FINITE)
    write_json(result_path(folder, one.cell), result)
    return result["status"]


def _complete(run: Path, steps: int) -> bool:
    found = checkpoint.newest(run, lambda text: None)
    return found is not None and found.step == steps


def _last_words(run: Path, code: int) -> str:
    log = run.with_name(f"{run.name}.log")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    what = errors[-1].removeprefix("error: ") if errors else f"exit code {code}"
    return f"{what} (all it said: {log})"


def _claim(run: Path) -> IO[str] | None:
    """The cell's lock, which its process inherits and holds from its first moment to its last; None while held.

    A killed study leaves its cells running; whoever continues it waits for them here.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_name(f"{run.name}.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _stop(working: list[Working]) -> None:
    """Ask the processes to save and end, and wait for them."""
    for one in working:
        with suppress(ProcessLookupError):
            one.process.terminate()
    for one in working:
        one.process.wait()


def _devices() -> list[str]:
    """The GPUs that cells may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    if named:
        return named.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]


def interruptible() -> None:
    """Let SIGTERM stop a study as Ctrl-C does: its cells save and end."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
