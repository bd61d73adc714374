"""The small interface over what distributes the training: DeepSpeed ZeRO, or plain torch.

An engine owns the model's parameters, the optimizer and the EMA; it knows nothing of diffusion, data or files'
names. One file an engine; its name is `engine.kind`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class Engine(Protocol):
    """What the training loop asks of an engine. Collective means: every process must call it."""

    compute_dtype: torch.dtype
    optimizer: torch.optim.Optimizer

    def forward(
        self, x: torch.Tensor, time_B: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        """The network's output, ready for `backward`."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch. The loss already carries 1 / (micro batch x
        accumulation); gradients are averaged over the processes. Collective."""
        ...

    def step(self, lr: float) -> None:
        """Call after every `backward`; updates the weights and the EMA when the accumulation is
        full, unless a gradient is not finite. Collective."""
        ...

    def num_skipped(self) -> int:
        """Updates skipped since the start because a gradient was not finite. Waits for the device."""
        ...

    def skip_count(self) -> torch.Tensor | int:
        """The same as a tensor [] on the device or a number, at once."""
        ...

    def save(self, folder: Path) -> None:
        """Write this process's part of the training state. Collective."""
        ...

    def can_load(self) -> bool:
        """Whether `load` is still possible: not once a step is captured in a graph."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, at the same number of processes. Collective."""
        ...

    def weights(self, ema: bool) -> dict[str, torch.Tensor] | None:
        """All weights in float32 on the host (on the first process; None elsewhere). Collective."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was decided, for the run's manifest."""
        ...


def frozen_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers in the state dict and parameters without gradient: the same in model and EMA."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {
        name: tensor.detach().float().cpu().clone()
        for name, tensor in module.state_dict().items()
        if name not in trained
    }
