"""Saving while training: what belongs into a checkpoint, written at once or by a thread beside the training.

All that needs the other processes (whole weights from their shards) is gathered first, in memory. Then every process
writes files of its own, and all agree on whether each could: a disk that refuses one of them ends the save on all.

A thread (`checkpoint.asynchronous`) does the same with copies of the tensors, and agrees over a channel of its own.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from speed_engine import engines
from speed_engine.config import Checkpoint as Settings
from speed_engine.distributed import Processes
from speed_engine.engines import Engine
from speed_engine.errors import SaidElsewhere
from speed_engine.step_table import StepTable
from speed_engine.training import checkpoint, save_time
from speed_engine.training.heartbeat import Pulse
from speed_engine.training.metrics import Meter
from speed_engine.training.run_lock import RunLock
from speed_engine.weights import file as weights_file

METHOD_STATE = "timesteps.safetensors"  # of a method that changes while training runs
INTERVAL_STATE = "interval.safetensors"  # sums of the line of metrics that is not full yet
FAILURES = (checkpoint.CheckpointError, SaidElsewhere)


class Saver:
    """Saves one run. Every method but `failed` is collective; leave it by `with`, which waits for the thread.

    blueprint: the network on the device meta. manifest: of the run. held: the first process's lock of the run folder.
    warn: tells a person one line, on any process. pulse: is told of the saving, and of the step that is committed.
    """

    def __init__(
        self,
        run: Path,
        settings: Settings,
        engine: Engine,
        table: StepTable,
        meter: Meter,
        all_reduce: Callable[[Tensor], object] | None,
        blueprint: nn.Module,
        manifest: dict[str, Any],
        processes: Processes,
        held: RunLock | None,
        warn: Callable[[str], None],
        pulse: Pulse,
    ) -> None:
        self.run, self.settings, self.engine = run, settings, engine
        self.table, self.meter = table, meter
        self.all_reduce, self.blueprint, self.manifest = all_reduce, blueprint, manifest
        self.processes, self.held, self.warn, self.pulse = processes, held, warn, pulse
        self.writers = processes.on_another_channel() if settings.asynchronous else processes
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.said_slow = False

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.thread is not None:
            with self.pulse.during("save"):
                self.thread.join()

    @property
    def failed(self) -> bool:
        """Whether the thread has ended with a failure that `finish` will raise."""
        return self.failure is not None

    def save(self, step: int, last: bool = False) -> None:
        """Commit a checkpoint of `step`, after the one under way. `last`: there will be no other one.

        Raises CheckpointError (on one process; SaidElsewhere on the others) where that fails, unless
        `checkpoint.on_error` lets the run go on; the older checkpoints are intact.
        """
        with self.pulse.during("save"):
            self._save(step, last)

    def save_at_end(self, step: int) -> None:
        """`save`, the last one, unless `step` is saved already."""
        self.finish()
        if self.pulse.saved != step:
            self.save(step, last=True)

    def _save(self, step: int, last: bool) -> None:
        self.finish()
        held, processes = self.held, self.processes
        try:
            lost = processes.attempt(lambda: held is not None and held.retake())
            checkpoint.prepare(self.run, step, processes)
            write, size = self._gathered(step)
            if self.settings.asynchronous:
                job = (step, write, size, lost)
                self.thread = threading.Thread(target=self._in_thread, args=job)
                self.thread.start()
            else:
                self._commit(step, write, size, lost)
        except FAILURES as error:
            self._end_or_go_on(error, last)
        if last:
            self.finish(last=True)

    def finish(self, last: bool = False) -> None:
        """Wait until the save under way is committed. Raises what `save` does."""
        if self.thread is None:
            return
        with self.pulse.during("save"):
            self.thread.join()
        self.thread, failure, self.failure = None, self.failure, None
        if failure is not None:
            self._end_or_go_on(failure, last)

    def _end_or_go_on(self, failure: Exception, last: bool) -> None:
        if last or self.settings.on_error == "end" or not isinstance(failure, FAILURES):
            raise failure
        if not isinstance(failure, SaidElsewhere):
            self.warn(f"{failure}; training goes on (checkpoint.on_error=go_on)")

    def _in_thread(self, step: int, write: Callable[[Path], None], size: int, lost: bool) -> None:
        try:
            self._commit(step, write, size, lost)
        except Exception as error:  # raised by `finish`
            self.failure = error

    def _commit(self, step: int, write: Callable[[Path], None], size: int, lost: bool) -> None:
        """lost: on the first process, that somebody had removed the run folder."""
        writers, keep, pin = self.writers, self.settings.keep, self.settings.pin_every
        began = time.monotonic()
        checkpoint.commit(self.run, step, writers, write, self.manifest, keep, pin, size)
        self.pulse.saved = step
        slow = save_time.too_long(time.monotonic() - began, f"step {step} did")
        if slow and writers.first and not self.said_slow:
            self.said_slow = True
            self.warn(slow)
        failure = checkpoint.CheckpointError(
            f"{self.run} was removed while the run used it; step {step} is saved there again, and the "
            "same command goes on from it"
        )
        writers.end_together(failure if lost else None)

    def _gathered(self, step: int) -> tuple[Callable[[Path], None], int]:
        """(what writes this process's files into a folder, about how many bytes)."""
        processes, engine = self.processes, self.engine
        method = self.table.state_dict(self.all_reduce)
        processes.assert_equal(method, "the table of time steps")
        interval = self.meter.state(processes)
        partial = checkpoint.partial_folder(self.run, step)
        with processes.waits():
            state = engine.state(partial / "state")
            weights = {name: engine.weights(ema=name == "ema") for name in ("model", "ema")}
        notes = {"step": step, "run": self.manifest["config"], "data": self.manifest["data"]}
        size = stored_bytes([state, weights, method if processes.first else None])
        if self.settings.asynchronous:
            method, state = on_host([method, state])

        def write(folder: Path) -> None:
            (folder / "state").mkdir(exist_ok=True)
            engines.write(state, folder / "state")
            if processes.first and method:
                weights_file.write_safetensors(folder / METHOD_STATE, method)
            if processes.first:
                weights_file.write_safetensors(folder / INTERVAL_STATE, {"sums": interval})
            for name, values in weights.items():
                if values is not None:
                    path = folder / f"{name}.safetensors"
                    weights_file.save(path, self.blueprint, values, notes)

        return write, size


def stored_bytes(value: Any) -> int:
    """Bytes of all tensors of a nested state; a storage that several share is written once."""
    storages: dict[int, int] = {}

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, dict):
            for each in part.values():
                add(each)
        elif isinstance(part, (list, tuple)):
            for each in part:
                add(each)

    add(value)
    return sum(storages.values())


def on_host(value: Any) -> Any:
    """A copy of a nested state, its tensors in the host's memory, sharing what they shared.

    torch.save writes a copy of a state on the host exactly as it writes that state.
    """
    memo: dict[int, Any] = {}

    def move(part: Any) -> None:
        """Note the copies of the device's storages, where deepcopy looks for them."""
        if isinstance(part, Tensor):
            if part.device.type != "cpu":
                memo[id(part)] = part.detach().cpu()
        elif isinstance(part, dict):
            for each in part.values():
                move(each)
        elif isinstance(part, (list, tuple)):
            for each in part:
                move(each)

    move(value)
    return copy.deepcopy(value, memo)
