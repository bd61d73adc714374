"""Batches on their way to the training device, beside the training step and not behind it.

On CUDA everything that the reading thread launches (copies from pinned memory, the conversion to model space, a
posterior's draw) goes to a stream of its own; whoever takes a batch lets his stream wait for that batch's event, and
the host waits for nothing. On the CPU there is nothing to copy.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from speed_engine.data import Batch


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; on its way there, on the current stream, when it comes from the host."""
    if tensor.device.type == device.type:
        return tensor
    # torch keeps pinned buffers, and reuses one when the stream has read it.
    return tensor.pin_memory().to(device, non_blocking=True)


class Copies:
    """The way to one device. `stream`: None on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def beside(self) -> AbstractContextManager[object]:
        """Within it the calling thread launches on the stream (and on its device)."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def sent(self) -> torch.cuda.Event | None:
        """What a taker of everything sent so far has to wait for."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def take(self, batch: Batch, sent: torch.cuda.Event | None) -> Batch:
        """The batch, for work on the calling thread's stream."""
        if sent is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent)
            for tensor in (batch.x0, batch.address, *batch.conditions.values()):
                tensor.record_stream(current)  # its memory is not reused before that stream is done
        return batch
