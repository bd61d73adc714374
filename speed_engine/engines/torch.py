"""`engine: torch`: one device, or plain DDP. The same training without DeepSpeed.

`precision: autocast` is torch.autocast over float32 weights; `bf16` computes and keeps the network's weights in bf16
and updates float32 masters, moments and EMA from the bf16 gradients in one pass of adamw_ema. For one GPU, for reading,
and for measuring what DeepSpeed costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, field_validator
from speed_kernels.adamw_ema.optimizer import AdamWEMA
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speed_engine.distributed import Processes
from speed_engine.engines import (
    frozen_weights,
    optimizer,
    restore_frozen,
    shards,
    with_precision,
)
from speed_engine.engines.cuda_graph import (
    CapturedStep,
    CudaRecorder,
    Recorder,
    refuse_what_cannot_be_captured,
)
from speed_engine.engines.exact_sums import TreeSums, fix_threads
from speed_engine.engines.master_weights import GradientSums, Masters
from speed_engine.kinds import Section


class Config(Section):
    """Settings of the plain torch engine."""

    kind: Literal["torch"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )
    precision: Literal["auto", "fp32", "bf16", "autocast"] = Field(
        "auto",
        description="bf16: bf16 weights and compute, float32 master weights; autocast: bf16 products, float32 weights; "
        "auto: bf16 on CUDA, else fp32",
    )
    compile: Literal["off", "block", "model"] = Field(
        "off", description="torch.compile each block of the network, or all of it"
    )
    cuda_graph: bool = Field(
        False, description="the whole step as one CUDA graph; one process, no accumulation"
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class TorchEngine:
    """See `speed_engine.engines.Engine`."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optim_config: optimizer.Config,
        processes: Processes,
        *,
        micro_batch: int,
        accumulation: int,
        backend: str,
        exact_sums: bool = False,
    ) -> None:
        if config.cuda_graph:
            refuse_what_cannot_be_captured(
                processes.device,
                processes.world,
                accumulation,
                optim_config.name,
                config.compile != "off",
            )
        config = with_precision(config, processes.device, optim_config.name)
        bf16 = config.precision == "bf16"
        if bf16 and optim_config.name != "adamw_ema":
            raise ValueError(
                f"engine.precision=bf16 updates float32 masters from bf16 gradients, which optim.name="
                f"{optim_config.name} cannot; set optim.name=adamw_ema or engine.precision=autocast"
            )
        self.config = config
        self.processes = processes
        self.accumulation = accumulation
        self.micro_steps = 0
        self.one = torch.ones((), device=processes.device)  # autograd would make one at each call
        self.compute_dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        self.module = model.to(processes.device)
        self.masters = Masters(self.module, torch.bfloat16 if bf16 else torch.float32)
        self.sums: GradientSums | TreeSums | None = None
        if exact_sums:
            fix_threads(processes.device)
            self.sums = TreeSums(self.masters, processes)
        elif bf16 and accumulation > 1:
            self.sums = GradientSums(self.masters)
        self.optimizer = optimizer.build(
            optim_config,
            self.masters.tensors,
            backend,
            clip_norm=optim_config.clip,
            copies=self.masters.copies,
        )
        self.graph: CapturedStep | None = None
        if config.compile == "block":
            for block in _blocks(self.module):
                block.compile()
        self.network: nn.Module = self.module
        if processes.world > 1 and not exact_sums:
            ids = [processes.device.index] if processes.device.type == "cuda" else None
            # Buffers are the same everywhere already, and a gradient needs no memory beside its bucket.
            self.network = DistributedDataParallel(
                self.module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if config.compile == "model":
            self.network.compile()

    def _communication(self) -> contextlib.AbstractContextManager[None]:
        """DDP averages the gradients once an update: in its last micro-batch, or `sums` does."""
        last = (self.micro_steps + 1) % self.accumulation == 0 and self.sums is None
        if last or not isinstance(self.network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def forward(
        self, x: torch.Tensor, time_B: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        kind, cast = self.processes.device.type, self.config.precision == "autocast"
        with self._communication(), torch.autocast(kind, torch.bfloat16, enabled=cast):
            return self.network(x, time_B, **conditions)

    def alone(self) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
        """(the network, the forward pass of this process alone): no gradient of it reaches another process."""

        def forward(
            x: torch.Tensor, time_B: torch.Tensor, **conditions: torch.Tensor
        ) -> torch.Tensor:
            network: nn.Module = self.network
            quiet: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if isinstance(network, DistributedDataParallel):
                quiet = network.no_sync()
            kind, cast = self.processes.device.type, self.config.precision == "autocast"
            with quiet, torch.autocast(kind, torch.bfloat16, enabled=cast):
                return network(x, time_B, **conditions)

        return self.module, forward

    def backward(self, loss: torch.Tensor) -> None:
        with self._communication():
            loss.backward(self.one)
        if self.sums is not None:
            self.sums.add()
        self.micro_steps += 1

    def step(self, lr: float) -> None:
        if self.micro_steps % self.accumulation:
            return
        self._set_rate(lr)
        self._update()

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _update(self) -> None:
        if isinstance(self.sums, TreeSums):
            self.sums.finish()
        elif self.sums is not None:
            self.sums.average(self.processes.world)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def captured(
        self, add_gradients: Callable[..., Any], recorder: Recorder | None = None
    ) -> Callable[..., Any]:
        """`step(lr, inputs)`: `add_gradients(inputs)`, then the update, as one CUDA graph (`cuda_graph: true`).

        `inputs` are tensors by name. `add_gradients` calls `forward` and `backward` and returns tensors; see
        CapturedStep for what it may do.
        `recorder` stands in for CUDA in tests. Call `load` before the first step.
        """
        optimizer = self.optimizer
        assert isinstance(optimizer, AdamWEMA), "refused when the engine was made"

        def work(inputs: Mapping[str, torch.Tensor]) -> Any:
            result = add_gradients(inputs)
            self._update()
            return result

        recorder = recorder or CudaRecorder(self.processes.device)
        graph = self.graph = CapturedStep(work, recorder, before_replays=optimizer.refresh)

        def step(lr: float, inputs: Mapping[str, torch.Tensor]) -> Any:
            self._set_rate(lr)
            optimizer.refresh()  # a replay reads the rate from the device
            return graph(inputs)

        return step

    def num_skipped(self) -> int:
        return optimizer.num_skipped(self.optimizer)

    def skip_count(self) -> torch.Tensor | int:
        return optimizer.skip_count(self.optimizer)

    def grad_norm(self) -> float | None:
        return optimizer.grad_norm(self.optimizer)

    def state(self, folder: Path) -> dict[str, Any]:
        if not self.processes.first:  # all processes hold the same state
            return {}
        frozen = frozen_weights(self.module) | self.masters.frozen
        parts = self.masters.parts()
        return shards.collected(parts, self.optimizer, index=0, files=1, frozen=frozen, counts={})

    def can_load(self) -> bool:
        return self.graph is None or self.graph.replay is None

    def load(self, folder: Path) -> None:
        if not self.can_load():
            raise RuntimeError("the step was captured with the state there is; load before it runs")
        if shards.are_in(folder):
            with shards.Shards(folder) as state:
                shards.restore(self.masters.parts(), self.optimizer, state)
                restore_frozen(self.module, state.frozen)
                self.masters.restored(state.frozen)
            return
        device = self.processes.device  # an earlier version's
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
        self.masters.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def weights(self, ema: bool) -> dict[str, torch.Tensor] | None:
        if not self.processes.first:
            return None
        result = frozen_weights(self.module) | self.masters.frozen
        for name, master in self.masters.named():
            source = optimizer.ema_of(self.optimizer, master) if ema else master
            result[name] = source.detach().float().cpu().clone()
        return result

    def _distribution(self) -> str:
        if not dist.is_initialized() or self.processes.world == 1:
            return "one process"
        return "a tree of sums" if isinstance(self.sums, TreeSums) else "DDP"

    def facts(self) -> dict[str, Any]:
        return {
            "engine": "torch",
            "distribution": self._distribution(),
            "optimizer": type(self.optimizer).__name__,
        }


def _blocks(module: nn.Module) -> nn.ModuleList:
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"engine.compile=block compiles each module of `blocks`, a ModuleList that {type(module).__name__} does "
            "not have; set engine.compile=model or off"
        )
    return blocks


open_engine = TorchEngine  # the name by which the loop finds it
