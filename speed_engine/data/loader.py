"""Batches ahead of time: what the slots of a step hold, read by a thread and copied to the device.

Stateless: any step can be asked for, so a resume at step n is `Loader(...).batches(n, ...)`.
"""

from __future__ import annotations

import functools
import inspect
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from speed_engine.conditions import Augmenting, Condition, Encoding, Mirroring, Noising
from speed_engine.data import Batch, Source, order
from speed_engine.data.copies import Copies, send
from speed_engine.distributed import Processes

AHEAD = 4  # batches read before they are needed
JOIN = 2.0  # seconds that a read under way may still take at the end
# Slots whose samples and flips are decided at once: 0.04 ms of CPU a step of 256, and 0.35 ms step by step.
SLOTS_AT_ONCE = 2**14

Item: TypeAlias = tuple[Batch, torch.cuda.Event | None] | BaseException


class StoppedWaiting(Exception):
    """A batch was waited for when the end was asked for."""


@dataclass(frozen=True)
class Address:
    """One micro-batch of one process before anything is read: sample and flip of each slot."""

    step: int
    first_slot: int
    indices: np.ndarray  # int64 [B]
    flips: np.ndarray | None  # bool [B]


@dataclass(frozen=True)
class Loader:
    """Where batches come from and how they are split over processes and micro-batches.

    conditions: those that the network is told, by name. backend: of the op that draws the
    posterior's normals. dtype: of x0; another than float32 for latents alone (`Space.to_model`).
    """

    source: Source
    conditions: Mapping[str, Condition]
    seed: int
    global_batch: int
    micro_batch: int
    flip: bool
    processes: Processes
    backend: str
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._check_dtype()
        if self.flip and not self.source.facts.flips:
            raise ValueError(
                "train.flip=true, but the data hold no flipped latents; encode them again with "
                "--flip, or set train.flip=false"
            )
        for condition in self.conditions.values():
            if isinstance(condition, Encoding):
                device = self.processes.device
                self.processes.attempt(functools.partial(condition.load, device))

    def _check_dtype(self) -> None:
        if self.dtype == torch.float32:
            return
        if self.source.facts.space.kind == "pixels":
            raise ValueError(
                "train.latents=bf16 is for latents, and the data are pixels, which bf16 would move by up to a quarter "
                "of a byte; set train.latents=fp32"
            )
        source: Any = self.source
        while hasattr(source, "source"):  # a part of a set, or a set in memory
            source = source.source
        if "dtype" not in inspect.signature(source.decode).parameters:
            raise ValueError(
                f"train.latents=bf16, but {type(source).__name__}.decode takes no dtype; add the argument (see "
                "speed_engine.data.Source), or set train.latents=fp32"
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
        ready: queue.Queue[Item] = queue.Queue(maxsize=AHEAD)
        stopped = threading.Event()
        copies = Copies(self.processes.device)

        def read() -> None:
            try:
                with copies.beside():
                    for address in self.addresses(first_step, end_step, left_out):
                        item = self._read(address), copies.sent()
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
                yield copies.take(*item)
        finally:
            stopped.set()
            while not ready.empty():
                ready.get_nowait()
            thread.join(JOIN)  # storage that hangs is left behind with its thread

    def of_one_step(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the next step, so that nothing is computed of a step that lacks one."""
        return [next(batches) for _ in range(self.accumulation)]

    def addresses(
        self, first_step: int, end_step: int, left_out: Sequence[int] = ()
    ) -> Iterator[Address]:
        """The micro-batches of steps first_step .. end_step - 1, in order, unread.

        left_out: see `order.data_step`."""
        num, rank, world = self.micro_batch, self.processes.rank, self.processes.world
        first_slot_A = (np.arange(self.accumulation) * world + rank) * num
        slot_AB = first_slot_A[:, None] + np.arange(num)
        steps_at_once = max(1, SLOTS_AT_ONCE // slot_AB.size)
        for begin in range(first_step, end_step, steps_at_once):
            step_S = np.arange(begin, min(begin + steps_at_once, end_step))
            step_S11 = step_S[:, None, None]
            data_S11 = order.data_step(step_S11, left_out)
            index_SAB = order.sample_indices(
                self.seed, data_S11, slot_AB, self.global_batch, len(self.source)
            )
            flip_SAB = order.flips(self.seed, step_S11, slot_AB) if self.flip else None
            for s, step in enumerate(step_S.tolist()):
                for a, first_slot in enumerate(first_slot_A.tolist()):
                    flips = None if flip_SAB is None else flip_SAB[s, a]
                    yield Address(step, first_slot, index_SAB[s, a], flips)

    def _read(self, at: Address) -> Batch:
        device = self.processes.device
        stored, read = self.source.read(at.indices, at.flips)
        arrays: Mapping[str, torch.Tensor] = read
        address = send(torch.tensor([at.step, at.first_slot], dtype=torch.int64), device)
        conditions: dict[str, torch.Tensor] = {}
        for condition in self.conditions.values():
            if at.flips is not None and isinstance(condition, Mirroring):
                arrays = condition.mirrored(arrays, torch.from_numpy(at.flips))
            conditions |= condition.drop(arrays, self.seed, at.step, at.first_slot)
        conditions = {name: send(value, device) for name, value in conditions.items()}
        facts, normals = self.source.facts, None
        if facts.space.posterior:
            shape = (len(at.indices), *facts.shape)
            normals = order.posterior_normals(self.seed, address, shape, self.backend)
        options = {} if self.dtype == torch.float32 else {"dtype": self.dtype}
        x0 = self.source.decode(send(stored, device), normals, **options)
        for condition in self.conditions.values():
            if isinstance(condition, Augmenting):
                x0, told = condition.augment(x0, self.seed, at.step, at.first_slot)
                conditions |= told
            if isinstance(condition, Noising):
                conditions |= condition.noised(conditions, self.seed, at.step, at.first_slot)
        return Batch(x0, conditions, address)


def _next(ready: queue.Queue[Item], stopping: Callable[[], bool]) -> Item:
    while True:
        try:
            return ready.get(timeout=0.5)
        except queue.Empty:
            if stopping():
                raise StoppedWaiting from None
