"""Batches ahead of time: what the slots of a step hold, read by a thread and copied to the device.

Stateless: any step can be asked for, so a resume at step n is `Loader(...).batches(n, ...)`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch

from speed_engine.conditions import Condition
from speed_engine.data import Batch, Source, order
from speed_engine.distributed import Processes

AHEAD = 4  # batches read before they are needed
JOIN = 2.0  # seconds that a read under way may still take at the end


class StoppedWaiting(Exception):
    """A batch was waited for when the end was asked for."""


@dataclass(frozen=True)
class Loader:
    """Where batches come from and how they are split over processes and micro-batches.

    conditions: those that the network is told, by name. backend: of the op that draws the
    posterior's normals.
    """

    source: Source
    conditions: Mapping[str, Condition]
    seed: int
    global_batch: int
    micro_batch: int
    flip: bool
    processes: Processes
    backend: str

    def __post_init__(self) -> None:
        if self.flip and not self.source.facts.flips:
            raise ValueError(
                "train.flip=true, but the data hold no flipped latents; encode them again with "
                "--flip, or set train.flip=false"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of one process in one step."""
        return self.global_batch // (self.micro_batch * self.processes.world)

    def batches(
        self,
        first_step: int,
        end_step: int,
        stopping: Callable[[], bool] = lambda: False,
        left_out: Sequence[int] = (),
    ) -> Generator[Batch]:
        """The micro-batches of steps first_step .. end_step - 1, in order; errors of the reading
        thread are raised here. Raises StoppedWaiting where a batch is not there and `stopping()`.

        left_out: see `order.data_step`."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=AHEAD)
        stopped = threading.Event()

        def read() -> None:
            try:
                for step in range(first_step, end_step):
                    for micro in range(self.accumulation):
                        item = self._on_device(step, micro, left_out)
                        while not stopped.is_set():
                            try:
                                ready.put(item, timeout=0.1)
                                break
                            except queue.Full:
                                continue
                        if stopped.is_set():
                            return
            except BaseException as error:  # handed over, raised by the consumer
                ready.put(error)

        thread = threading.Thread(target=read, name="loader", daemon=True)
        thread.start()
        try:
            for _ in range((end_step - first_step) * self.accumulation):
                item = _next(ready, stopping)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            while not ready.empty():
                ready.get_nowait()
            thread.join(JOIN)  # storage that hangs is left behind with its thread

    def _on_device(self, step: int, micro: int, left_out: Sequence[int] = ()) -> Batch:
        num, seed = self.micro_batch, self.seed
        first_slot = (micro * self.processes.world + self.processes.rank) * num
        where = order.data_step(step, left_out)
        indices = order.batch_indices(
            seed, where, first_slot, num, self.global_batch, len(self.source)
        )
        flips = order.flips(seed, step, first_slot, num) if self.flip else None
        stored, arrays = self.source.read(indices.numpy(), flips)
        address = self._to_device(torch.tensor([step, first_slot], dtype=torch.int64))
        conditions: dict[str, torch.Tensor] = {}
        for condition in self.conditions.values():
            conditions |= condition.drop(arrays, seed, step, first_slot)
        facts, normals = self.source.facts, None
        if facts.space.posterior:
            shape = (num, *facts.shape)
            normals = order.posterior_normals(seed, address, shape, self.backend)
        return Batch(
            self.source.decode(self._to_device(stored), normals),
            {name: self._to_device(value) for name, value in conditions.items()},
            address,
        )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.processes.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.processes.device, non_blocking=True)


def _next(
    ready: queue.Queue[Batch | BaseException], stopping: Callable[[], bool]
) -> Batch | BaseException:
    while True:
        try:
            return ready.get(timeout=0.5)
        except queue.Empty:
            if stopping():
                raise StoppedWaiting from None
