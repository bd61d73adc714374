"""The small interface over what distributes the training: DeepSpeed ZeRO, or plain torch.

An engine owns the model's parameters, the optimizer and the EMA; it knows nothing of diffusion, data or files'
names. One file an engine; its name is `engine.kind`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch import save as torch_save  # `torch` becomes the engine of that name in this package

from speed_engine.engines import shards
from speed_engine.kinds import Section

Settings = TypeVar("Settings", bound=Section)


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

    def grad_norm(self) -> float | None:
        """Norm of the last update's whole gradient before clipping; None where nothing needed it. Waits for the
        device."""
        ...

    def state(self, folder: Path) -> dict[str, Any]:
        """What this process is to write into `folder` with `write`: file name -> value. Collective.

        Nothing is written, so that a disk that refuses never leaves another process waiting. The
        tensors are the living ones: write or copy them before the next step.
        """
        ...

    def can_load(self) -> bool:
        """Whether `load` is still possible: not once a step is captured in a graph."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `state` gave and `write` wrote. Collective.

        Where that are shards (`shards.are_in(folder)`), any number of processes and either engine of ours wrote them;
        else the same engine at the same number of processes.
        """
        ...

    def weights(self, ema: bool) -> dict[str, torch.Tensor] | None:
        """All weights in float32 on the host (on the first process; None elsewhere). Collective."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was decided, for the run's manifest."""
        ...


def with_precision(config: Settings, device: torch.device, optimizer: str) -> Settings:
    """An engine's settings with `precision: auto` decided for `device`; others, and outside engines', as they are.

    bf16 on a CUDA device, whose products in float32 take many times as long; fp32 elsewhere. `optimizer`
    (`optim.name`): those that update no masters get autocast instead, from an engine that has it.
    """
    if getattr(config, "precision", None) != "auto":
        return config
    choice = "fp32"
    if device.type == "cuda":
        masters = optimizer == "adamw_ema" or getattr(config, "kind", None) == "deepspeed"
        choice = "bf16" if masters else "autocast"
    return config.model_copy(update={"precision": choice})


def write(state: Mapping[str, Any], folder: Path) -> None:
    """Write an engine's state into a folder that exists. Raises OSError, RuntimeError (torch's writer)."""
    for name, value in state.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            shards.write(value, folder / name)
        else:
            torch_save(value, folder / name)


def frozen_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers in the state dict and parameters without gradient: the same in model and EMA."""
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {
        name: tensor.detach().float().cpu().clone()
        for name, tensor in module.state_dict().items()
        if name not in trained
    }


@torch.no_grad()
def restore_frozen(module: nn.Module, frozen: Mapping[str, torch.Tensor]) -> None:
    """Put what `frozen_weights` gave back into a module. Raises ValueError for another network's."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if name in frozen and not tensor.requires_grad:
            if tensor.shape != frozen[name].shape:
                raise ValueError(f"{name} is of another shape in the checkpoint")
            tensor.copy_(frozen[name])
