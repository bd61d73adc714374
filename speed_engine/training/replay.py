"""`train.replay_every`: a step's gradient is computed twice and compared bit for bit, before its update.

A processor that computes wrongly without saying so, or memory that loses a bit, spoils a run for good and in silence.
All random numbers of a step are functions of its address, so nothing has to be restored to compute it again: the same
micro-batches, the same draws, the same weights. What does not come out the same bits is no rounding.

Each process compares what its own micro-batches amount to, before processes add that up, and so names the machine. A
kernel whose sums come in an order of chance (atomics) would be blamed, too.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speed_engine.distributed import Processes

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of a dtype's size


class Unrepeatable(RuntimeError):
    """A gradient that was not the same bits when it was computed again; names process, step and tensor."""


@dataclass(frozen=True)
class Replay:
    """Compares the gradients of every `every`-th step.

    module: the network, as it is trained. forward: the engine's, but of this process alone.
    """

    every: int
    module: nn.Module
    forward: Callable[..., Tensor]
    processes: Processes

    def due(self, step: int) -> bool:
        """Whether the update that follows `step` finished steps is looked at."""
        return (step + 1) % self.every == 0

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def noting(self) -> Iterator[dict[str, Tensor]]:
        """Inside, what each backward pass gives a parameter is added up under its name, beside what the engine does."""
        noted: dict[str, Tensor] = {}

        def note(name: str) -> Callable[[Tensor], None]:
            return lambda gradient: _add(noted, name, gradient)

        handles = [p.register_hook(note(name)) for name, p in self._trained().items()]
        try:
            yield noted
        finally:
            for handle in handles:
                handle.remove()

    def compare(self, step: int, noted: dict[str, Tensor], losses: Iterable[Tensor]) -> None:
        """Raise Unrepeatable unless the gradients of `losses`, one a micro-batch, are what was noted. Collective.

        On the other processes than that which differs SaidElsewhere is raised.
        """
        trained = self._trained()
        again: dict[str, Tensor] = {}
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    _add(again, name, gradient)
        self.processes.end_together(self._difference(step, noted, again))

    def _difference(
        self, step: int, noted: dict[str, Tensor], again: dict[str, Tensor]
    ) -> Unrepeatable | None:
        names = [name for name in self._trained() if name in noted or name in again]
        counts = [_differing(noted.get(name), again.get(name)) for name in names]
        found = torch.stack(counts).tolist() if counts else []
        for name, count in zip(names, found, strict=True):
            if count:
                size = again[name].numel() if name in again else noted[name].numel()
                return Unrepeatable(
                    f"the gradient of step {step}, computed again on process {self.processes.rank} "
                    f"({socket.gethostname()}), is not the same bits: {name} differs first, in {count} of {size} "
                    "elements; that machine's processor or memory computes wrongly, or a kernel there does not repeat "
                    "itself. The step was not applied, and the checkpoints before it are kept"
                )
        return None


def _add(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    gradient = gradient.detach()
    if name in sums:
        sums[name].add_(gradient)
    else:
        sums[name] = gradient.clone()


def _differing(one: Tensor | None, other: Tensor | None) -> Tensor:
    """How many elements differ in any bit; int64 [] on the device. Of a missing one all."""
    if one is None or other is None:
        there = other if one is None else one
        assert there is not None
        return torch.tensor(there.numel(), device=there.device)
    bits = BITS[one.element_size()]
    return (one.contiguous().view(bits) != other.contiguous().view(bits)).sum()
