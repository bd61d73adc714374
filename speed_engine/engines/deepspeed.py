"""`engine: deepspeed`: DeepSpeed does the distribution (ZeRO 0 to 3, many nodes); we write none.

The only file that imports DeepSpeed. The EMA is part of the optimizer's state, so ZeRO shards, saves and restores it
with the rest; full weights are assembled only to be exported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from speed_engine.distributed import Processes
from speed_engine.engines import (
    deepspeed_parts,
    frozen_weights,
    optimizer,
    restore_frozen,
    shards,
    with_precision,
)
from speed_engine.engines.deepspeed_json import merged_with, read, users_part
from speed_engine.kinds import Section

TAG = "zero"
COUNTS = ("skipped_steps", "global_steps", "global_samples")  # of DeepSpeed's, kept over a resume
# Of ZeRO 1 and 2 on GPUs, unless a JSON says otherwise. DeepSpeed's own are false and 5e8: most of a model in one
# bucket, whose sum waits for the end of the backward pass.
OVERLAPPED = {
    "overlap_comm": True,
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
}


class Config(Section):
    """Settings of the DeepSpeed engine."""

    kind: Literal["deepspeed"] = "deepspeed"
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="bf16: bf16 weights and compute, float32 master weights; auto: bf16 on CUDA, else fp32",
    )
    zero: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage")
    json_file: str | None = Field(
        None, description="a DeepSpeed JSON to merge (buckets, offload ...); may not contradict us"
    )


class DeepSpeedEngine:
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
    ) -> None:
        import deepspeed
        import deepspeed.ops

        config = with_precision(config, processes.device, optim_config.name)
        # On CPUs DeepSpeed would first compile a shared-memory all-reduce for most of a minute;
        # gloo does the same sums.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": micro_batch * accumulation * processes.world,
            # DeepSpeed's own default is 1.0; DiT trains without clipping.
            "gradient_clipping": optim_config.clip,
            "zero_optimization": {"stage": config.zero},
            "bf16": {"enabled": config.precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        settings = merged_with(config.json_file, settings)
        if processes.device.type == "cuda" and config.zero in (1, 2):
            settings["zero_optimization"] = OVERLAPPED | settings["zero_optimization"]
        self.users = users_part(read(config.json_file)) if config.json_file else {}
        own_guard = _guard_ourselves(settings, optim_config)
        self.config = config
        self.settings = settings
        self.processes = processes
        self.compute_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        model = model.to(processes.device)
        for (
            parameter
        ) in model.parameters():  # it sends them as bytes, which other strides cannot be
            parameter.data = parameter.data.contiguous()
        self.frozen = frozen_weights(model)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.unwrapped = config.zero == 0 and config.precision == "fp32"
        fused_adam = None
        if optim_config.name == "deepspeed_fused":
            from deepspeed.ops.adam import FusedAdam as fused_adam
        self.optimizer = optimizer.build(
            optim_config,
            self.trained,
            backend,
            clip_norm=optim_config.clip if own_guard else 0.0,
            guard=own_guard or self.unwrapped,  # elsewhere DeepSpeed skips what is not finite
            reduce_square_sum=processes.all_reduce() if own_guard else None,
            deepspeed_adam=fused_adam,
        )
        self.engine: Any
        with _local_rank_told(processes.local_rank):
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
            )
        if config.zero == 0 and config.precision == "bf16":
            # This wrapper makes a step with zero gradients while it is built: undo it.
            self.engine.optimizer.refresh_fp32_params()
            optimizer.reset(self.optimizer)

    def forward(
        self, x: torch.Tensor, time_B: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        with _local_rank_told(self.processes.local_rank):  # ZeRO 3 asks for it in its first steps
            return self.engine(x, time_B, **conditions)

    def alone(self) -> tuple[nn.Module, Callable[..., torch.Tensor]] | None:
        """(the network, the forward pass of this process alone); None in ZeRO 3, where no process has a network."""
        if self.config.zero == 3:
            return None
        return self.engine.module, self.engine.module

    def backward(self, loss: torch.Tensor) -> None:
        with _local_rank_told(self.processes.local_rank):
            self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        with _local_rank_told(self.processes.local_rank):
            self.engine.step()

    def num_skipped(self) -> int:
        # DeepSpeed's own guard and the optimizer's.
        return int(self.engine.skipped_steps) + optimizer.num_skipped(self.optimizer)

    def skip_count(self) -> torch.Tensor | int:
        return optimizer.skip_count(self.optimizer) + int(self.engine.skipped_steps)

    def grad_norm(self) -> float | None:
        found = optimizer.grad_norm(self.optimizer)
        theirs = self.engine.get_global_grad_norm()
        # 0 is what DeepSpeed says of a norm that it did not take.
        return float(theirs) if found is None and theirs else found

    def state(self, folder: Path) -> dict[str, Any]:
        if deepspeed_parts.fits(self.settings):
            return self._shard()
        collected, writer = _Collected(), self.engine.checkpoint_engine
        self.engine.checkpoint_engine = collected
        self.engine._copy_recovery_script = lambda path: (
            None
        )  # a script to merge what we export whole
        try:
            self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        finally:
            self.engine.checkpoint_engine = writer
        return {os.path.relpath(path, folder): value for path, value in collected.files.items()}

    def can_load(self) -> bool:
        return True

    def _shard(self) -> dict[str, Any]:
        rank, whole = self.processes.rank, self.config.zero == 0
        if whole and rank:  # all processes hold the same state
            return {}
        return shards.collected(
            self._parts(),
            self.optimizer,
            index=rank,
            files=1 if whole else self.processes.world,
            frozen=self.frozen if rank == 0 else {},
            counts={name: int(getattr(self.engine, name)) for name in COUNTS},
        )

    def _parts(self) -> list[shards.Part]:
        wrapper, stage = self.engine.optimizer, self.config.zero
        return deepspeed_parts.parts_of(self.engine.module, wrapper, stage, self.unwrapped)

    def load(self, folder: Path) -> None:
        if shards.are_in(folder):
            self._load_shards(folder)
            return
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:  # DeepSpeed only logs this
            raise ValueError(f"DeepSpeed found nothing to load in {folder}")

    def _load_shards(self, folder: Path) -> None:
        if not deepspeed_parts.fits(self.settings):
            raise ValueError(
                f"engine.json_file lets DeepSpeed keep the weights where the state in {folder} cannot be put; go on "
                "without that part of it, or start in another run_dir"
            )
        wrapper = self.engine.optimizer
        with shards.Shards(folder) as state:
            shards.restore(self._parts(), self.optimizer, state)
            self._load_frozen(state.frozen)
            for name in COUNTS:
                setattr(self.engine, name, state.counts.get(name, 0))
        rank = self.processes.rank
        deepspeed_parts.into_network(wrapper, self.config.zero, self.unwrapped, rank)

    def _load_frozen(self, frozen: dict[str, torch.Tensor]) -> None:
        if not frozen:
            return
        from deepspeed.runtime.zero import GatheredParameters

        held = [p for p in self.engine.module.parameters() if not p.requires_grad]
        cut = self.config.zero == 3 and held
        gathered = GatheredParameters(held, modifier_rank=0) if cut else contextlib.nullcontext()
        self.frozen = dict(frozen)
        with gathered:
            restore_frozen(self.engine.module, frozen)

    def weights(self, ema: bool) -> dict[str, torch.Tensor] | None:
        result = dict(self.frozen)
        whole = self._whole(ema)
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                result[name] = whole(parameter).detach().float().cpu().clone()
        return result if self.processes.first else None

    def _whole(self, ema: bool) -> Callable[[nn.Parameter], Any]:
        """The function parameter -> its whole float32 weights or EMA, assembled from all processes.

        Collective: every process must ask for the same parameters in the same order.
        """
        wrapper = self.engine.optimizer
        if self.config.zero == 0:  # DeepSpeed keeps no map here: ours is in order
            masters = {id(p): p for p in self.trained}
            if not self.unwrapped:
                groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
                masters = {id(a): b for low, high in groups for a, b in zip(low, high, strict=True)}
            if ema:
                return lambda p: optimizer.ema_of(self.optimizer, masters[id(p)])
            return lambda p: masters[id(p)]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not ema or not self.optimizer.state:  # before the first update the EMA is the weights
            return safe_get_full_fp32_param
        if self.config.zero < 3:
            # The map from parameters to optimizer state is made once, and wrong after a load.
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()
        return lambda p: safe_get_full_optimizer_state(p, "ema")

    def facts(self) -> dict[str, Any]:
        import deepspeed

        return {
            "engine": f"DeepSpeed {deepspeed.__version__}",
            "distribution": f"ZeRO stage {self.config.zero}",
            "optimizer": type(self.optimizer).__name__,
            "deepspeed_config": self.settings,
            "deepspeed_json": self.users,
        }


class _Collected:
    """Stands where DeepSpeed has its writer of files: keeps what would be written.

    DeepSpeed waits for all processes after it has written, so that one whose disk refuses leaves the others waiting.
    """

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[path] = state_dict

    def create(self, info: Any) -> None:
        """Nothing is begun."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """No folder is needed yet."""

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, rank: int) -> bool:
        return rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True


@contextlib.contextmanager
def _local_rank_told(local_rank: int) -> Iterator[None]:
    """DeepSpeed insists on LOCAL_RANK, even alone; afterwards the environment is as it was."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _guard_ourselves(settings: dict[str, Any], optim_config: optimizer.Config) -> bool:
    """Whether adamw_ema refuses gradients that are not finite, and clips; if so, `settings` tell DeepSpeed not to.

    In ZeRO 1 and 2 DeepSpeed looks for what is not finite, and for the norm, with several passes over each parameter's
    gradient, and waits for the device to tell. adamw_ema does both with one pass over the flat partition, and no host
    waits; it sees the whole gradient through one sum of one number over the processes.
    """
    zero = settings["zero_optimization"]
    if optim_config.name != "adamw_ema" or zero["stage"] not in (1, 2):
        return False
    if zero.get("offload_optimizer") or zero.get("zenflow"):  # these need DeepSpeed's norm
        return False
    sums = settings.get("data_types", {}).get("grad_accum_dtype")
    if zero["stage"] == 1 and sums == "fp32" and settings["bf16"]["enabled"]:
        return False  # another wrapper of DeepSpeed's, which insists on its own norm
    settings["gradient_clipping"] = 0.0
    zero["compute_grad_norm"] = False
    settings["bf16"]["check_grad_overflow"] = False
    return True


open_engine = DeepSpeedEngine  # the name by which the loop finds it
