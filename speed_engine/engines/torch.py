"""`engine: torch`: one device, or plain DDP. The same training without DeepSpeed.

bf16 means autocast over float32 weights. For one GPU, for reading, and for measuring what DeepSpeed costs.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speed_engine import optim
from speed_engine.engines import frozen_weights
from speed_engine.processes import Processes


class Config(BaseModel):
    """Settings of the plain torch engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["torch"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast, float32 weights"
    )
    compile: bool = Field(False, description="torch.compile the network")


class TorchEngine:
    """See `speed_engine.engines.Engine`."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optim_config: optim.Config,
        processes: Processes,
        *,
        micro_batch: int,
        accumulation: int,
        backend: str,
    ) -> None:
        self.module = model.to(processes.device)
        self.optimizer = optim.build(
            optim_config,
            [p for p in self.module.parameters() if p.requires_grad],
            backend,
            clip_norm=optim_config.clip,
        )
        self.processes = processes
        self.accumulation = accumulation
        self.micro_steps = 0
        self.one = torch.ones((), device=processes.device)  # autograd would make one at each call
        self.precision = config.precision
        self.compute_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.network: nn.Module = self.module
        if processes.world > 1:
            ids = [processes.device.index] if processes.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.module, device_ids=ids)
        if config.compile:
            self.network.compile()

    def _communication(self) -> contextlib.AbstractContextManager[None]:
        """DDP averages the gradients once an update: in its last micro-batch."""
        last = (self.micro_steps + 1) % self.accumulation == 0
        if last or not isinstance(self.network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def forward(self, *inputs: Any) -> torch.Tensor:
        kind, bf16 = self.processes.device.type, self.precision == "bf16"
        with self._communication(), torch.autocast(kind, torch.bfloat16, enabled=bf16):
            return self.network(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        with self._communication():
            loss.backward(self.one)
        self.micro_steps += 1

    def step(self, lr: float) -> None:
        if self.micro_steps % self.accumulation:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def num_skipped(self) -> int:
        return optim.num_skipped(self.optimizer)

    def save(self, folder: Path) -> None:
        if self.processes.first:  # all processes hold the same state
            state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save(state, folder / "state.pt")

    def load(self, folder: Path) -> None:
        device = self.processes.device
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def weights(self, ema: bool) -> dict[str, torch.Tensor] | None:
        if not self.processes.first:
            return None
        result = frozen_weights(self.module)
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                source = optim.ema_of(self.optimizer, parameter) if ema else parameter
                result[name] = source.detach().float().cpu().clone()
        return result

    def facts(self) -> dict[str, Any]:
        return {
            "engine": "torch",
            "distribution": "DDP"
            if dist.is_initialized() and self.processes.world > 1
            else "one process",
            "optimizer": type(self.optimizer).__name__,
        }


open_engine = TorchEngine  # the name by which the loop finds it
