"""`python -m speed_engine plan`: what a configuration would cost, without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from speed_engine.conditions import label
from speed_engine.config import RunConfig
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.data.storage.index import INDEX
from speed_engine.engines import with_precision
from speed_engine.kinds import find
from speed_engine.training.assembly import (
    build_model,
    build_source,
    build_table,
    macs_per_sample,
    parted,
    told,
)
from speed_engine.training.preview import share_of_training as grids_share
from speed_engine.training.validation import share_of_training

# What the plan assumes while the data do not exist yet: latents of a 256x256 image, 1000 classes.
ASSUMED = Facts(
    (4, 32, 32),
    Space("latents", (0.18215,) * 4, (0.0,) * 4),
    {"label": label.described(1000)},
)
DIGITS = Facts((1, 8, 8), Space.pixels(1), {"label": label.described(10)})
GIB = 2**30


def state_bytes(parameters: int, zero: int, precision: str, world: int) -> float:
    """Bytes of weights, gradients, AdamW moments and EMA on one process (Rajbhandari et al. 2020,
    section 3, plus 4 bytes a parameter for the EMA)."""
    weights, gradients, states = (4, 4, 12) if precision != "bf16" else (2, 2, 16)
    share = [1.0 if zero < stage else 1.0 / world for stage in (3, 2, 1)]
    return parameters * (weights * share[0] + gradients * share[1] + states * share[2])


def run(config: RunConfig) -> int:
    """Print the plan. Raises ValueError for a configuration that cannot run."""
    data, source, remarks = _data(config)
    config, conditions, facts = told(config, data)
    model = build_model(config, facts, "meta")
    # A fixed position embedding is a tensor of the public checkpoints, and counted there.
    parameters = sum(t.numel() for t in model.state_dict().values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    macs = macs_per_sample(config, facts)
    table = build_table(config)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip())
    print()
    print(f"data            {source}: {facts.space.kind} of {'x'.join(map(str, facts.shape))}")
    for remark in remarks:
        print(f"WARNING         {remark}")
    for name, condition in conditions.items():
        values = f"{condition.facts.num_values} values" if condition.facts.num_values else ""
        arrays = [
            f"{key} {each.dtype} {list(each.shape)}" for key, each in condition.facts.arrays.items()
        ]
        dropped = f"dropped at {getattr(config.conditions[name], 'dropout', 0):g}"
        print(f"condition       {name}: {', '.join(filter(None, [values, *arrays, dropped]))}")
    print(f"parameters      {parameters:,} ({parameters / 1e6:.4g} M), {trained:,} of them trained")
    print(f"forward pass    {macs / 1e9:.3g} GMAC = {2 * macs / 1e9:.3g} GFLOP a sample")
    batch, steps = config.train.global_batch, config.train.steps
    print(f"training        {steps:,} steps of {batch}: {6.0 * macs * batch * steps:.2e} FLOP")
    if share := share_of_training(config):
        print(
            f"validation      {config.validation.samples} held-out samples every {config.validation.every} steps: "
            f"{share:.1%} of the training's FLOP"
        )
    if share := grids_share(config):
        print(
            f"samples         {config.sample.num} every {config.sample.every} steps: {share:.1%} of the training's FLOP"
        )
    _print_memory(config, facts, trained)
    expected = float((table.density * table.weight).sum())
    print(
        f"time steps      {config.timesteps.kind} on {config.schedule.kind}, {table.num_rows} rows; "
        f"E[weight] = {expected:.4f}"
    )
    for key, value in table.method.resolved.items():
        print(f"                {key} = {value}")
    return 0


def _data(config: RunConfig) -> tuple[Facts, str, Sequence[str]]:
    """(the data, where that comes from, remarks). Data that are not there yet are assumed, and said so."""
    path = getattr(config.data, "path", None)
    # The digits are made by training where they are missing; a plan writes nothing.
    made = config.data.kind == "digits"
    if path is None or (Path(path) / INDEX if made else Path(path)).exists():
        source, _ = parted(config, build_source(config))
        return source.facts, str(path or config.data.kind), getattr(source, "remarks", ())
    return (
        (DIGITS, "digits", ())
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
    return Facts(shape, space, ASSUMED.conditions)


def _print_memory(config: RunConfig, facts: Facts, parameters: int) -> None:
    """One line for each ZeRO stage, on 1, 8 and 64 processes."""
    module = find("model", config.model.kind)
    has_gpu = getattr(config.engine, "device", "auto") != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda" if has_gpu else "cpu")
    engine = with_precision(config.engine, where, config.optim.name)
    precision = getattr(engine, "precision", "fp32")
    print(
        f"memory          weights, gradients, optimizer and EMA on a process, {precision} (estimate):"
    )
    print("                ZeRO    1 process  8 processes  64 processes")
    for zero in range(4):
        sizes = [state_bytes(parameters, zero, precision, world) / GIB for world in (1, 8, 64)]
        print(
            f"                   {zero} {sizes[0]:8.2f} GiB {sizes[1]:8.2f} GiB {sizes[2]:9.2f} GiB"
        )
    if hasattr(module, "activation_bytes_per_sample"):
        each = module.activation_bytes_per_sample(config.model, facts, precision=precision)
        micro = config.train.micro_batch or config.train.global_batch
        print(
            f"                activations: {each / 2**20:.1f} MiB a sample, {micro * each / GIB:.1f} GiB "
            f"for a micro-batch of {micro} (estimate)"
        )
