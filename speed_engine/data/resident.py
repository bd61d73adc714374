"""A whole set in the memory of the training device: a batch is then a gather, and nothing is read from files.

Batches are those of the files, bit for bit. ImageNet's latents at 256 pixels take 10.5 GB, twice that with mirrored
ones. On the CPU the set lies in main memory, once a process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from speed_engine.data import Source
from speed_engine.data.copies import send

AUTO_SHARE = 6  # `auto` takes at most this part of the memory: the rest is the training step's
CHUNK = 2048  # samples read at once while loading


@dataclass(frozen=True)
class Residence:
    """Where a run reads its samples from. reason: one sentence, for the log and the manifest."""

    source: Source
    reason: str


def choose(
    source: Source, wanted: Literal["auto"] | bool, *, flip: bool, device: torch.device, world: int
) -> Residence:
    """The source as it is, or a Resident around it. Nothing is loaded yet.

    world: processes, which on the CPU share one memory. Raises ValueError, with the bytes, where
    the set was to be resident and does not fit.
    """
    if wanted is False:
        return Residence(source, "samples are read from the source: train.resident=false")
    needed = predicted_bytes(source, flip) * (world if device.type == "cpu" else 1)
    free = free_bytes(device)
    sizes = f"the set takes {needed / 1e9:.3g} GB, and {device} has {free / 1e9:.3g} GB free"
    if wanted is True and needed > free:
        raise ValueError(f"train.resident=true: {sizes}; set train.resident=false or auto")
    if wanted == "auto" and needed > free // AUTO_SHARE:
        return Residence(source, f"samples are read from the source: {sizes}")
    return Residence(Resident(source, flip, device), f"samples are resident: {sizes}")


def predicted_bytes(source: Source, flip: bool) -> int:
    """What `Resident` will hold, from the size of the first sample."""
    stored, arrays = source.read(np.zeros(1, np.int64))
    beside = sum(array.nbytes for array in arrays.values())
    return len(source) * (stored.nbytes * (1 + flip) + beside)


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody uses now; of a machine that does not tell, all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    for line in told.read_text().splitlines() if told.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Resident:
    """A data.Source that holds another one's samples: x on `device`, the conditions' arrays on the host.

    Loaded by the first `read`, which checks every sample as the other source does. flip: hold the
    mirrored samples, too.
    """

    def __init__(self, source: Source, flip: bool, device: torch.device) -> None:
        self.source, self.facts, self.fingerprint = source, source.facts, source.fingerprint
        self.device, self.flip = device, flip
        self._held: tuple[Tensor, dict[str, Tensor]] | None = None
        self._loading = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def read(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        flips: Sequence[bool] | np.ndarray | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `data.Source`; x comes on the device. flips: only of a set held with `flip`."""
        with self._loading:
            if self._held is None:
                self._held = self._load()
        x, arrays = self._held
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        row = chosen
        if flips is not None:
            assert self.flip, "the mirrored samples were not loaded"
            row = chosen + torch.as_tensor(flips, dtype=torch.int64) * len(self)
        told = {name: array[chosen] for name, array in arrays.items()}
        return x[send(row, self.device)], told

    def decode(self, stored: Tensor, normals: Tensor | None = None, **dtype: Any) -> Tensor:
        """See `data.Source`."""
        return self.source.decode(stored, normals, **dtype)

    def _load(self) -> tuple[Tensor, dict[str, Tensor]]:
        x, arrays = None, {}
        num = len(self)
        for mirrored in range(1 + self.flip):
            for begin in range(0, num, CHUNK):
                chosen = np.arange(begin, min(begin + CHUNK, num))
                flips = np.full(len(chosen), bool(mirrored)) if self.flip else None
                stored, told = self.source.read(chosen, flips)
                if x is None:
                    x = stored.new_empty(
                        (num * (1 + self.flip), *stored.shape[1:]), device=self.device
                    )
                    arrays = {
                        name: each.new_empty((num, *each.shape[1:])) for name, each in told.items()
                    }
                x[mirrored * num + begin :][: len(chosen)].copy_(send(stored, self.device))
                for name, each in told.items():
                    arrays[name][begin : begin + len(chosen)] = each
        assert x is not None, "a set holds at least one sample"
        if self.device.type == "cuda":  # once: from now on any stream may read
            torch.cuda.current_stream(self.device).synchronize()
        return x, arrays
