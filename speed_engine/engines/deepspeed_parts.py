"""Where DeepSpeed keeps each element of the float32 weights: ZeRO's partitions as `Part`s, and back into the network.

ZeRO 0      every process holds all: the parameters themselves, or float32 twins of bf16 ones
ZeRO 1, 2   all parameters of a group in one row, padded and cut into one piece a process
ZeRO 3      every parameter cut into one padded piece a process; pieces of many parameters in one row
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from speed_engine.engines.shards import Part


def fits(settings: dict[str, Any]) -> bool:
    """Whether the elements are where this file says; elsewhere DeepSpeed's own files hold the state.

    Not where they lie on a disk, nor where other classes of DeepSpeed's cut them. settings: DeepSpeed's.
    """
    zero = settings["zero_optimization"]
    offloads = [zero.get(key) or {} for key in ("offload_optimizer", "offload_param")]
    on_disk = any(offload.get("device") == "nvme" for offload in offloads)
    cut_otherwise = (
        bool(zero.get("zenflow"))
        or zero.get("mics_shard_size", -1) > 0
        or zero.get("zero_hpz_partition_size", 1) > 1
        or any(offload.get("super_offload") for offload in offloads)
    )
    return not on_disk and not cut_otherwise


def parts_of(module: nn.Module, wrapper: Any, stage: int, unwrapped: bool) -> list[Part]:
    """What this process holds. wrapper: DeepSpeed's optimizer; `unwrapped`: it is ours, over the parameters."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if stage == 0:
        holders = {id(p): p for _, p in named}
        if not unwrapped:
            groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            holders = {id(a): b for low, high in groups for a, b in zip(low, high, strict=True)}
        return [
            Part(name, tuple(p.shape), 0, p.numel(), holders[id(p)], 0)
            for name, p in named
            if p.numel()
        ]
    if stage == 3:
        return [part for name, p in named if (part := _cut_part(name, p, wrapper)) is not None]
    return [
        Part(
            name,
            tuple(p.shape),
            at.lp_fragment_address.start,
            at.lp_fragment_address.numel,
            wrapper.optimizer.param_groups[at.param_group_index]["params"][0],
            at.hp_fragment_address.start,
        )
        for name, p in named
        if (at := getattr(p, "_hp_mapping", None)) is not None
    ]


def _cut_part(name: str, parameter: Any, wrapper: Any) -> Part | None:
    """This process's piece of a parameter in ZeRO 3; None where it holds padding alone."""
    group, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start = size * wrapper._get_param_partition_rank(parameter)
    numel = min(size, parameter.ds_numel - start)
    holder = wrapper.fp32_partitioned_groups_flat[group]
    return (
        Part(name, tuple(parameter.ds_shape), start, numel, holder, offset) if numel > 0 else None
    )


@torch.no_grad()
def into_network(wrapper: Any, stage: int, unwrapped: bool, rank: int) -> None:
    """After the float32 weights have changed: the network's own become them, on all processes. Collective."""
    if stage == 0:
        if not unwrapped:
            for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                for parameter, master in zip(low, high, strict=True):
                    parameter.data.copy_(master.data)
    elif stage < 3:
        wrapper.update_lp_params()
        wrapper._hp_optimizer_states_linked = False  # its map is of the state that was
    else:
        wrapper.checkpoint_event_prologue()
        weights = {
            "loss_scaler": wrapper.loss_scaler,
            "dynamic_loss_scale": wrapper.dynamic_loss_scale,
            "overflow": wrapper.overflow,
            "fp32_flat_groups": wrapper.fp32_partitioned_groups_flat,
        }
        wrapper.load_state_dict({rank: weights}, load_optimizer_states=False)
        wrapper.checkpoint_event_epilogue()
