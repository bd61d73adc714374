"""Batches ahead of time: what the slots of a step hold, read by a thread and copied to the device.

Stateless: any step can be asked for, so a resume at step n is `Feed(...).batches(n, ...)`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from speed_engine.data import order
from speed_engine.distributed import Processes

AHEAD = 4  # batches read before they are needed


@dataclass(frozen=True)
class Batch:
    """One micro-batch of this process. Everything is on the training device."""

    x0: torch.Tensor  # [B, C, H, W] float32, model space
    labels: torch.Tensor | None  # int64 [B], label drop applied; None without classes
    address: torch.Tensor  # int64 [2]: (step, first global slot)


@dataclass(frozen=True)
class Feed:
    """Where batches come from and how they are split over processes and micro-batches."""

    source: Any  # a speed_engine.data source
    seed: int
    global_batch: int
    micro_batch: int
    null_label: int | None
    label_dropout: float
    flip: bool
    processes: Processes
    backend: str  # of the `noise` op, which also draws the posterior's normals

    def __post_init__(self) -> None:
        if self.flip and not self.source.can_flip:
            raise ValueError(
                "train.flip=true, but the data hold no flipped latents; encode them again with "
                "--flip, or set train.flip=false"
            )

    @property
    def accumulation(self) -> int:
        """Micro-batches of one process in one step."""
        return self.global_batch // (self.micro_batch * self.processes.world)

    def batches(self, first_step: int, end_step: int) -> Generator[Batch]:
        """The micro-batches of steps first_step .. end_step - 1, in order; errors of the reading
        thread are raised here."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=AHEAD)
        stopped = threading.Event()

        def read() -> None:
            try:
                for step in range(first_step, end_step):
                    for micro in range(self.accumulation):
                        item = self._on_device(step, micro)
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

        thread = threading.Thread(target=read, name="feed", daemon=True)
        thread.start()
        try:
            for _ in range((end_step - first_step) * self.accumulation):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            while not ready.empty():
                ready.get_nowait()
            thread.join()

    def _on_device(self, step: int, micro: int) -> Batch:
        num, seed = self.micro_batch, self.seed
        first_slot = (micro * self.processes.world + self.processes.rank) * num
        indices = order.batch_indices(
            seed, step, first_slot, num, self.global_batch, len(self.source)
        )
        flips = order.flips(seed, step, first_slot, num) if self.flip else None
        stored, labels = self.source.read(indices.tolist(), flips)
        address = self._to_device(torch.tensor([step, first_slot], dtype=torch.int64))
        if self.null_label is not None:
            labels = order.drop_labels(
                labels, self.null_label, self.label_dropout, seed, step, first_slot
            )
        normals = None
        if self.source.has_posterior:
            shape = (num, *self.source.shape)
            normals = order.posterior_normals(seed, address, shape, self.backend)
        return Batch(
            self.source.decode(self._to_device(stored), normals),
            self._to_device(labels) if self.source.num_classes else None,
            address,
        )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.processes.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.processes.device, non_blocking=True)
