"""The largest |1 + scale| of a network's adaLN layers, for the line of the log: it grows long before a run explodes.

Looked at in the one step whose line is written, on the device; in all others nothing is hooked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from speed_engine.distributed import Processes


class Scales:
    """Watches the modules that have `SCALES`: (number of parts of their second input, which are scales)."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.modules = [each for each in module.modules() if hasattr(each, "SCALES")]
        self.largest = torch.zeros((), device=device)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Inside, every forward pass counts; what was found before is forgotten."""
        self.largest.zero_()
        handles = [each.register_forward_pre_hook(self._note) for each in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _note(self, module: Any, inputs: tuple[object, ...]) -> None:
        modulation_BX = inputs[1]
        assert isinstance(modulation_BX, Tensor)
        num_parts, scales = module.SCALES
        parts = modulation_BX.detach().chunk(num_parts, 1)
        for which in scales:
            found = (1.0 + parts[which].float()).abs().amax()
            # A NaN is kept: the guard speaks of it.
            self.largest.copy_(torch.maximum(self.largest, found))

    def read(self, processes: Processes) -> float:
        """The largest of all processes. Collective; waits for the device."""
        return processes.largest(float(self.largest))


def of(module: nn.Module, device: torch.device, engine: object) -> Scales | None:
    """What watches a network; None for one without adaLN, and where its modules' calls are compiled or captured."""
    unseen = getattr(engine, "compile", "off") != "off" or getattr(engine, "cuda_graph", False)
    found = Scales(module, device)
    return found if found.modules and not unseen else None
