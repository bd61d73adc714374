"""`python -m speed_engine plan`: what a configuration would cost, without starting anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from speed_engine.conditions import image, label, text
from speed_engine.config import RunConfig
from speed_engine.data import ConditionFacts, Facts, glyphs
from speed_engine.data.glyph_pictures import CHARACTERS
from speed_engine.data.space import Space
from speed_engine.data.storage.index import INDEX
from speed_engine.engines import with_precision
from speed_engine.kinds import find
from speed_engine.progress import wrapped
from speed_engine.reports.plan_cost import (
    FORMULA,
    FP32_ON_GPU,
    GIB,
    Cluster,
    kept_for_backward,
    smallest_card,
    step_cost,
)
from speed_engine.training.assembly import (
    build_model,
    build_source,
    build_table,
    macs_per_sample,
    parted,
    told,
)
from speed_engine.training.preview import share_of_training as grids_share
from speed_engine.training.save_time import checkpoint_bytes
from speed_engine.training.validation import share_of_training

# What the plan assumes while the data do not exist yet: latents of a 256x256 image, 1000 classes.
ASSUMED = Facts(
    (4, 32, 32),
    Space("latents", (0.18215,) * 4, (0.0,) * 4),
    {"label": label.described(1000)},
)
# What training makes where it is missing; a plan writes nothing.
MADE = {
    "digits": Facts((1, 8, 8), Space.pixels(1), {"label": label.described(10)}),
    "glyphs": Facts(glyphs.SHAPE, Space.pixels(3), {"label": label.described(len(CHARACTERS))}),
}


def state_bytes(parameters: int, zero: int, precision: str, world: int) -> float:
    """Bytes of weights, gradients, AdamW moments and EMA on one process (Rajbhandari et al. 2020,
    section 3, plus 4 bytes a parameter for the EMA)."""
    weights, gradients, states = (4, 4, 12) if precision != "bf16" else (2, 2, 16)
    share = [1.0 if zero < stage else 1.0 / world for stage in (3, 2, 1)]
    return parameters * (weights * share[0] + gradients * share[1] + states * share[2])


def run(config: RunConfig, where: Cluster | None, on_gpus: bool = False) -> int:
    """Print the plan: first what decides (fits? bytes, hours), then the rest, the configuration last.

    where: the processes and their stated rates; None: one process of this machine, of which no time is predicted.
    on_gpus: plan for GPUs, whatever this machine has. Raises ValueError for a configuration that cannot run.
    """
    data, source, remarks = _data(config)
    config, conditions, facts = told(config, data)
    model = build_model(config, facts, "meta")
    # A fixed position embedding is a tensor of the public checkpoints, and counted there.
    parameters = sum(t.numel() for t in model.state_dict().values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    macs = macs_per_sample(config, facts)
    trained_macs = macs_per_sample(config, facts, training=True)
    table = build_table(config)
    batch, steps = config.train.global_batch, config.train.steps
    precision = _precision(config, on_gpus)
    _tell(f"data            {source}: {facts.space.kind} of {'x'.join(map(str, facts.shape))}")
    for remark in remarks:
        _tell(f"WARNING         {remark}")
    print(f"parameters      {parameters:,} ({parameters / 1e6:.4g} M), {trained:,} of them trained")
    print(f"forward pass    {macs / 1e9:.3g} GMAC = {2 * macs / 1e9:.3g} GFLOP a sample")
    if trained_macs != macs:
        print(
            f"                in training {trained_macs / macs:.3g} times that (all passes, tokens left out)"
        )
    print(
        f"training        {steps:,} steps of {batch}: {6.0 * trained_macs * batch * steps:.2e} FLOP"
    )
    if precision == "fp32" and _for_gpus(config, on_gpus):
        _tell(f"WARNING         {FP32_ON_GPU}")
    _print_need(config, facts, model, trained, precision, where)
    _print_time(config, trained, trained_macs, precision, where)
    print()
    for name, condition in conditions.items():
        values = f"{condition.facts.num_values} values" if condition.facts.num_values else ""
        arrays = [
            f"{key} {each.dtype} {list(each.shape)}" for key, each in condition.facts.arrays.items()
        ]
        dropped = f"dropped at {getattr(config.conditions[name], 'dropout', 0):g}"
        _tell(f"condition       {name}: {', '.join(filter(None, [values, *arrays, dropped]))}")
    once = macs / trained_macs  # validation and samples make one pass, over all tokens
    if share := once * share_of_training(config):
        _tell(
            f"validation      {config.validation.samples} held-out samples every {config.validation.every} steps: "
            f"{share:.1%} of the training's FLOP"
        )
    if share := once * grids_share(config):
        _tell(
            f"samples         {config.sample.num} every {config.sample.every} steps: "
            f"{share:.1%} of the training's FLOP"
        )
    _print_states(trained, precision)
    expected = float((table.density * table.weight).sum())
    _tell(
        f"time steps      {config.timesteps.kind} on {config.schedule.kind}, {table.num_rows} rows; "
        f"E[weight] = {expected:.4f}"
    )
    for key, value in table.method.resolved.items():
        print(f"                {key} = {value}")
    print(FORMULA)
    print()
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip())
    return 0


def _tell(line: str) -> None:
    print(wrapped(line, " " * 16))


def _data(config: RunConfig) -> tuple[Facts, str, Sequence[str]]:
    """(the data, where that comes from, remarks). Data that are not there yet are assumed, and said so."""
    path = getattr(config.data, "path", None)
    made = MADE.get(config.data.kind)
    if made and (side := getattr(config.data, "low_resolution", None)):
        small = image.described((made.shape[0], side, side), made.space)
        made = made.with_conditions({**made.conditions, "image": small})
    if path is None or (Path(path) / INDEX if made else Path(path)).exists():
        source, _ = parted(config, build_source(config))
        return source.facts, str(path or config.data.kind), getattr(source, "remarks", ())
    return (
        (made, config.data.kind, ())
        if made
        else (assumed(config), f"assumed, for {path} does not exist", ())
    )


def assumed(config: RunConfig) -> Facts:
    """`ASSUMED`, or pixels where the configuration says that it is made for those."""
    expected = getattr(config.data, "expect", None)
    if expected is None or expected.shape is None or expected.space is None:
        return ASSUMED
    shape = tuple(expected.shape)
    space = replace(ASSUMED.space, scale=(0.18215,) * shape[0], shift=(0.0,) * shape[0])
    if expected.space == "pixels":
        space = Space.pixels(shape[0])
    return Facts(shape, space, _assumed_conditions(config, shape, space))


def _assumed_conditions(
    config: RunConfig, shape: tuple[int, ...], space: Space
) -> dict[str, ConditionFacts]:
    """Classes, or five captions a picture (as COCO) of CLIP ViT-B/32 where the configuration is told of captions; and
    pictures of a fourth of the samples' sides where it is told of those."""
    found = ASSUMED.conditions
    if config.conditions.get("text") is not None:
        empty = {"text": np.zeros(512, "f2"), "text_tokens": np.zeros((77, 512), "f2")}
        found = {"text": text.described("openai/clip-vit-base-patch32", 5, empty, 512)}
    if config.conditions.get("image") is not None:
        small = (shape[0], shape[1] // 4, shape[2] // 4)
        found = {**found, "image": image.described(small, space)}
    return found


def _for_gpus(config: RunConfig, on_gpus: bool) -> bool:
    has_gpu = getattr(config.engine, "device", "auto") != "cpu" and torch.cuda.is_available()
    return on_gpus or has_gpu


def _precision(config: RunConfig, on_gpus: bool) -> str:
    device = torch.device("cuda" if _for_gpus(config, on_gpus) else "cpu")
    engine = with_precision(config.engine, device, config.optim.name)
    return getattr(engine, "precision", "fp32")


def _print_need(
    config: RunConfig,
    facts: Facts,
    model: nn.Module,
    trained: int,
    precision: str,
    where: Cluster | None,
) -> None:
    """The processes, and what each must hold: states by ZeRO stage, and activations."""
    nodes, each_has = (where.nodes, where.gpus) if where else (1, 1)
    many, batch = nodes * each_has, config.train.global_batch
    micro = config.train.micro_batch or max(1, batch // many)
    if batch % (many * micro):
        raise ValueError(
            f"train.global_batch={batch} cannot be shared by {many} processes in micro-batches of {micro}; choose a "
            f"multiple of {many * micro}"
        )
    print(
        f"processes       {nodes} x {each_has}, {batch // many} samples each a step, {micro} at a time, "
        f"{precision}"
    )
    module, how = find("model", config.model.kind), "estimate"
    if hasattr(module, "activation_bytes_per_sample"):
        each = module.activation_bytes_per_sample(config.model, facts, precision=precision)
    else:
        how = "counted on plain torch"
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        each = kept_for_backward(model, facts, dtype)
    states = state_bytes(trained, getattr(config.engine, "zero", 0), precision, many)
    need = states + micro * each
    print(
        f"activations     {each / 2**20:.1f} MiB a sample, {micro * each / GIB:.1f} GiB at a time ({how})"
    )
    print(
        f"fits?           {need / GIB:.1f} GiB a process, {states / GIB:.1f} of them states (estimate): "
        f"{_fits(need, where)}"
    )
    kept, saved = config.checkpoint.keep, checkpoint_bytes(trained, len(config.optim.emas()))
    print(
        f"disk            {saved / GIB:.2f} GiB a checkpoint with moments and EMA, {kept} kept: "
        f"{kept * saved / GIB:.2f} GiB"
    )


def _fits(need: float, where: Cluster | None) -> str:
    """What this machine says of it, or the smallest card that would do."""
    if torch.cuda.is_available():
        name, has = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    elif where is None:
        name, has = "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return f"needs {smallest_card(need)}"
    return f"{'yes' if need <= 0.9 * has else 'NO'}, {name} has {has / GIB:.0f} GiB"


def _print_time(
    config: RunConfig, trained: int, macs: float, precision: str, where: Cluster | None
) -> None:
    """Predicted images a second, hours, bytes on the wire and weak scaling, from the stated rates."""
    if where is None:
        print(
            "time            no GPU here: --gpus N predicts for H100s, --tflops T for what you state"
        )
        return
    batch, many = config.train.global_batch, where.processes
    gradient = 2 if precision == "bf16" else 4
    cost = step_cost(
        where, macs, trained, gradient, getattr(config.engine, "zero", 0), batch / many
    )
    print(
        f"time            predicted, not measured, at best {batch / cost.step_s:,.0f} images/s, "
        f"{config.train.steps * cost.step_s / 3600:,.1f} hours"
    )
    print(f"                from {where.tflops:.0f} TFLOP/s a process, {where.told}")
    if many > 1:
        print(
            f"wire            {cost.wire_bytes / GIB:.2f} GiB a process and step, {1e3 * cost.wire_s:.1f} ms beside "
            f"{1e3 * cost.products_s:.1f} ms of products"
        )
        print(
            f"weak scaling    predicted {cost.worst:.0%} to {cost.best:.0%} of {many} times one process, at "
            f"{where.inside:g} GB/s inside, {where.network:g} GB/s a node"
        )


def _print_states(parameters: int, precision: str) -> None:
    """One line for each ZeRO stage, on 1, 8 and 64 processes."""
    print("memory          weights, gradients, optimizer and EMA on a process (estimate):")
    print("                ZeRO    1 process  8 processes  64 processes")
    for zero in range(4):
        sizes = [state_bytes(parameters, zero, precision, world) / GIB for world in (1, 8, 64)]
        print(
            f"                   {zero} {sizes[0]:8.2f} GiB {sizes[1]:8.2f} GiB {sizes[2]:9.2f} GiB"
        )
