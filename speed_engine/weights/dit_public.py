"""The public DiT checkpoints (`DiT-XL-2-256x256.pt`), and others of their layout, as our DiT.

Their tensors have our names. What a file of bare tensors does not say is taken as the published models have it, and
told (`assumptions`): the heads are those of the named size, the last row of the label table is "none", and samples of
more than three channels are latents with the published scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from speed_engine.conditions import label
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import dit
from speed_engine.weights.fit import filled
from speed_engine.weights.pickles import Which, read_pt

TABLE = "y_embedder.embedding_table.weight"
FIRST, LAST, PLACES = "x_embedder.proj.weight", "final_layer.linear.weight", "pos_embed"
PUBLISHED_SCALE = 0.18215  # of the latents of Stable Diffusion's autoencoder


def import_pt(
    path: Path | str,
    config: dit.Config | None = None,
    which: Which = "auto",
    device: torch.device | str = "cpu",
    *,
    num_classes: int | None = None,
    num_heads: int | None = None,
) -> dit.DiT:
    """The model of a public DiT checkpoint, or of one with its layout.

    Everything is read from the shapes, except the number of heads: that of `config`, else
    `num_heads`, else that of the published size; and whether the last row of the label table is
    "none", which `num_classes` decides. Raises ValueError, naming the file.
    """
    weights = _without_prefix(read_pt(path, which), str(path))
    projection, last, places = (weights[key] for key in (FIRST, LAST, PLACES))
    if projection.ndim != 4 or last.ndim != 2 or places.ndim != 3:
        raise ValueError(f"{path} holds no DiT: {FIRST}, {LAST} or {PLACES} has another form")
    config = config or _config(weights, num_heads, str(path))
    refuse_other_size(config, weights, str(path))
    channels, patch = projection.shape[1:3]
    table = weights.get(TABLE)
    told = labels(None if table is None else len(table), num_classes, str(path))
    size = math.isqrt(places.shape[1]) * patch
    facts = Facts((channels, size, size), assumed_space(channels), told)
    num_outputs = len(last) // patch**2
    if num_outputs not in (channels, 2 * channels):
        raise ValueError(f"{path} has {num_outputs} output channels for {channels} input channels")
    return filled(
        lambda on: dit.build(config, facts, num_outputs, device=on), weights, str(path), device
    )


def labels(
    rows: int | None, num_classes: int | None, source: str
) -> dict[str, label.ConditionFacts]:
    """The condition of a label table with so many rows (None: no table), as facts.

    The last row is "none" unless `num_classes` counts it as a class. Raises ValueError where it
    fits neither reading.
    """
    if rows is None:
        if num_classes:
            raise ValueError(
                f"{source} has no label table, so it cannot have {num_classes} classes; leave out --num-classes"
            )
        return {}
    if num_classes is None:
        num_classes = max(rows - 1, 1)
    if num_classes not in (rows, rows - 1) or num_classes < 1:
        either = f"{rows - 1} (and a null label) or {rows}" if rows > 1 else f"{rows}"
        raise ValueError(
            f"{source} has a label table of {rows} rows, so it has {either} classes and not {num_classes};"
            " correct --num-classes"
        )
    return {"label": label.described(num_classes, null=num_classes < rows)}


def assumed_space(channels: int) -> Space:
    """Up to three channels are pixels; more are latents, scaled as the published models' are."""
    if channels <= 3:
        return Space.pixels(channels)
    return Space("latents", (PUBLISHED_SCALE,) * channels, (0.0,) * channels)


def assumptions(facts: Facts) -> list[str]:
    """What was taken of labels and space, one sentence each, and how to have it otherwise."""
    told = facts.conditions.get("label")
    if told is None:
        classes = "no labels: the network is unconditional"
    else:
        rows = told.num_values + told.null
        height = "1 row" if rows == 1 else f"{rows} rows"
        count = "1 class" if told.num_values == 1 else f"{told.num_values} classes"
        taken = f"a label table of {height}, read as {count} "
        if told.null:
            classes = (
                f"{taken}and a null label (--num-classes {rows}: as {rows} classes, no null label)"
            )
        else:
            classes = f"{taken}without a null label"
    channels = facts.shape[0]
    if facts.space.kind == "pixels":
        return [classes, f"samples of {channels} channels, taken as pixels"]
    scale = facts.space.scale[0]
    return [classes, f"samples of {channels} channels, taken as latents with the scale {scale}"]


def named_config(hidden: int, depth: int, num_heads: int | None, patch: int) -> dit.Config | None:
    """The published configuration of these numbers, or None. num_heads None: any."""
    for name, size in dit.SIZES.items():
        if size == (hidden, depth, num_heads or size.num_heads, patch):
            return dit.Config(size=name)
    return None


def refuse_other_size(config: dit.Config, weights: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError where weights with our names are of a DiT of another size."""
    found = _size(weights)
    hidden, depth, _, patch = config.resolved()
    if found != (hidden, depth, patch):
        raise ValueError(
            f"{source} holds {_name(*found)}, but the model is {_name(hidden, depth, patch)}"
        )


def _config(weights: Mapping[str, Tensor], num_heads: int | None, source: str) -> dit.Config:
    hidden, depth, patch = _size(weights)
    named = named_config(hidden, depth, num_heads, patch)
    if named is not None:
        return named
    if num_heads is None:
        raise ValueError(
            f"{source} holds {_name(hidden, depth, patch)}, which is no published size: give --num-heads,"
            " because the number of heads cannot be read from weights"
        )
    if num_heads < 1 or hidden % num_heads:
        raise ValueError(
            f"{source} has the hidden size {hidden}, which is no multiple of {num_heads} heads"
        )
    width = weights.get("blocks.0.mlp.fc1.bias")
    ratio = 4.0 if width is None else len(width) / hidden
    return dit.Config(
        hidden_size=hidden, depth=depth, num_heads=num_heads, patch_size=patch, mlp_ratio=ratio
    )


def _size(weights: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """(hidden size, depth, patch) of weights with our names."""
    hidden, _, patch, _ = weights[FIRST].shape
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    return hidden, len(blocks), patch


def _name(hidden: int, depth: int, patch: int) -> str:
    config = named_config(hidden, depth, None, patch)
    name = f"a DiT-{config.size}" if config else "a DiT of its own size"
    return f"{name} (hidden size {hidden}, {depth} blocks, patch {patch})"


def _without_prefix(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The DiT's tensors by their bare names; a trainer's module may hold the DiT beside other things.

    Raises ValueError where there is none, or more than one.
    """
    prefixes = [key.removesuffix(FIRST) for key in weights if f".{key}".endswith(f".{FIRST}")]
    if len(prefixes) > 1:
        raise ValueError(
            f"{source} holds several DiTs: {', '.join(map(repr, prefixes))}; store one"
        )
    prefix = prefixes[0] if prefixes else ""
    found = {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }
    absent = [key for key in (FIRST, LAST, PLACES) if key not in found]
    if absent:
        raise ValueError(f"{source} holds no DiT: {', '.join(absent)} is missing")
    return found
