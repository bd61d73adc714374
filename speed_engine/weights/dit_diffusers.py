"""A DiT to and from a folder of Hugging Face diffusers (`DiTTransformer2DModel`).

The layout differs from the public checkpoints': q, k and v are separate, the position embedding is not
stored, and the embedders of time and label are stored once per block.

One difference is mathematical: diffusers spaces the 128 time frequencies by 10000^(1/127), the
public code by 10000^(1/128). `model.frequency_shift` 1 is diffusers' way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from speed_engine.data import Facts
from speed_engine.models import dit
from speed_engine.weights.diffusers_folder import (
    own_header,
    read_json,
    read_weights,
    write_folder,
)
from speed_engine.weights.dit_public import (
    TABLE as OUR_TABLE,
)
from speed_engine.weights.dit_public import (
    assumed_space,
    labels,
    named_config,
    refuse_other_size,
)
from speed_engine.weights.file import build
from speed_engine.weights.fit import blueprint, filled, merged

# What every DiT of diffusers has; another value is another network.
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
# Our name -> diffusers' name. Every line stands for a weight and a bias.
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
IN_EVERY_BLOCK = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}
THEIR_TABLE = "norm1.emb.class_embedder.embedding_table.weight"


def export_diffusers(
    folder: Path | str,
    model: Any,
    weights: Mapping[str, Tensor] | None = None,
    *,
    notes: Mapping[str, Any] | None = None,
    null_at: int | None = None,
) -> list[str]:
    """Write `folder` so that `DiTTransformer2DModel.from_pretrained(folder)` loads it.

    `weights` (an EMA, say) replaces the model's own. notes: as in `weights.file.save`. null_at: the label that means
    "none" (a pipeline's own); the rows from the last class to it are all that of "none". Default: behind the last
    class. Returns, and warns of, what diffusers will do otherwise than we. Raises ValueError where its DiT cannot hold
    the model.
    """
    _refuse_other_networks(model)
    assert isinstance(model, dit.DiT)
    hidden, depth, num_heads, patch = model.config.resolved()
    tensors = merged(model, weights)
    places = dit.position_embedding(hidden, model.grid)
    if (tensors.pop("pos_embed").float() - places).abs().max() > 5e-3:
        raise ValueError("diffusers cannot hold this model: its position embedding is not sin-cos")
    # diffusers has a table of num_classes + 1 rows always.
    table = tensors.get(OUR_TABLE, torch.zeros(1, hidden, dtype=places.dtype))
    num_classes = max(_num_classes(model), 1) if null_at is None else null_at
    nothing = table[-1:] if null_at is not None else table.new_zeros(1, hidden)
    tensors[OUR_TABLE] = torch.cat([table, nothing.expand(num_classes + 1 - len(table), hidden)])
    description = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": num_heads,
        "attention_head_dim": hidden // num_heads,
        "in_channels": model.facts.shape[0],
        "out_channels": model.num_outputs,
        "num_layers": depth,
        "sample_size": model.sample_size,
        "patch_size": patch,
        "num_embeds_ada_norm": num_classes,
        "norm_eps": 1e-6,
        **FIXED,
    }
    cautions = list(_cautions(model, null_at is not None))
    theirs = {key: tensor.clone() for key, tensor in _to_theirs(tensors, depth)}
    write_folder(folder, model, theirs, description, cautions, notes)
    return cautions


def import_diffusers(
    folder: Path | str,
    frequency_shift: Literal[0, 1] | None = None,
    device: torch.device | str = "cpu",
    num_classes: int | None = None,
) -> dit.DiT:
    """The DiT of a diffusers folder (the one with `config.json`; `transformer` of a pipeline).

    `frequency_shift`: by default our own folder's, else 1, so that the model computes what
    diffusers computes; give 0 for a folder converted from public weights (`facebook/DiT-XL-2-256`),
    which were trained with 0. `num_classes`: by default our own folder's, else the last row of the
    label table is the null label. Raises ValueError, naming the folder, for anything that is not a
    DiT, whose blocks hold different embedders, or where our own folder was changed.
    """
    folder, source = Path(folder), str(folder)
    weights = read_weights(folder)
    header = own_header(folder, weights) or _described(
        read_json(folder / "config.json"), weights, source, num_classes
    )
    try:
        if frequency_shift is not None:
            header["model"]["config"]["frequency_shift"] = frequency_shift
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} has a JSON file that says nothing usable: {error}") from error
    model = blueprint(lambda on: build(header, source, on), weights, source)
    if type(model) is not dit.DiT:
        raise ValueError(f"{source} holds a {header['model']['kind']}, not a DiT")
    _refuse_absurd_size(model, weights, source)
    ours = _to_ours(weights, len(model.blocks), source)
    table, told = ours.pop(OUR_TABLE), model.facts.conditions.get("label")
    if told is not None:  # else a row of zeros, which the export added
        ours[OUR_TABLE] = table[: told.num_values + told.null]
    if num_classes not in (None, _num_classes(model)):
        raise ValueError(
            f"{source} was exported with {_num_classes(model)} classes, not {num_classes};"
            " leave out --num-classes"
        )
    refuse_other_size(model.config, ours, source)
    ours["pos_embed"] = dit.position_embedding(model.config.resolved().hidden_size, model.grid)
    return filled(lambda on: build(header, source, on), ours, source, device)


def _refuse_absurd_size(model: dit.DiT, weights: Mapping[str, Tensor], source: str) -> None:
    """The position embedding is not in the folder, so that any size could be claimed for it."""
    places = model.pos_embed.numel()
    if places > max(2**26, sum(tensor.numel() for tensor in weights.values())):
        raise ValueError(
            f"{source} claims samples of {model.sample_size}x{model.sample_size}, far larger than the network"
        )


def _refuse_other_networks(model: Any) -> None:
    """Raises ValueError, with the cure, for what diffusers' DiT has no place for."""
    instead = "export it with --format safetensors"
    if type(model) is not dit.DiT:
        kind = getattr(getattr(model, "config", None), "kind", type(model).__name__)
        raise ValueError(f"diffusers' DiT cannot hold a network of model.kind={kind}; {instead}")
    shape = model.facts.shape
    if len(shape) != 3 or shape[1] != shape[2]:
        size = "x".join(map(str, shape[1:]))
        raise ValueError(f"diffusers' DiT takes square images, not samples of {size}; {instead}")
    if other := [name for name in model.facts.conditions if name != "label"]:
        raise ValueError(f"diffusers' DiT has no place for the condition {other[0]!r}; {instead}")
    if model.config.mlp_ratio != 4:
        raise ValueError(
            f"diffusers cannot hold this model: its DiT has model.mlp_ratio 4,"
            f" not {model.config.mlp_ratio}; {instead}"
        )


def _num_classes(model: dit.DiT) -> int:
    told = model.facts.conditions.get("label")
    return told.num_values if told else 0


def _described(
    config: Any, weights: Mapping[str, Tensor], source: str, num_classes: int | None
) -> dict[str, Any]:
    """Our header for the model of a `config.json`. Raises ValueError where it is no DiT."""
    if not isinstance(config, dict):
        raise ValueError(f"{source} has a JSON file that says nothing usable: no mapping")
    name = config.get("_class_name")
    # Before 2024 a DiT's folder said Transformer2DModel, as other networks' folders did.
    is_dit = name == "DiTTransformer2DModel" or (
        name == "Transformer2DModel" and config.get("norm_type") == FIXED["norm_type"]
    )
    wrong = [f"{key} {config[key]}" for key in FIXED if config.get(key, FIXED[key]) != FIXED[key]]
    if not is_dit or wrong:
        found = f"{name} with {', '.join(wrong)}" if wrong else name
        raise ValueError(
            f"{source} holds {found}; only a DiTTransformer2DModel or a UNet2DModel can be imported"
        )
    keys = ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size")
    try:
        num_heads, head_dim, depth, patch = (int(config[key]) for key in keys)
        channels = int(config["in_channels"])
        outputs = int(config["out_channels"] or channels)
        sample_size, classes = int(config["sample_size"]), int(config["num_embeds_ada_norm"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has a config.json without a usable {error}") from error
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"{source} has {outputs} output channels for {channels} input channels")
    if not 0 < channels <= 10_000:
        raise ValueError(f"{source} has a config.json without a usable in_channels {channels}")
    if config.get("norm_eps", 1e-5) != 1e-6:
        warnings.warn(
            f"{source} has norm_eps {config.get('norm_eps', 1e-5)}; the model here uses 1e-6, as"
            " the public checkpoints do",
            stacklevel=3,
        )
    hidden = num_heads * head_dim
    named = named_config(hidden, depth, num_heads, patch)
    numbers = {"hidden_size": hidden, "depth": depth, "num_heads": num_heads, "patch_size": patch}
    table = weights.get(f"transformer_blocks.0.{THEIR_TABLE}")
    rows = classes + 1 if table is None else len(table)
    if rows != classes + 1:
        raise ValueError(
            f"{source} has a label table of {rows} rows, and its config.json says num_embeds_ada_norm {classes}"
        )
    shape, space = (channels, sample_size, sample_size), assumed_space(channels)
    return {
        "model": {
            "kind": "dit",
            "config": ({"size": named.size} if named else numbers) | {"frequency_shift": 1},
            "num_outputs": outputs,
        },
        "facts": Facts(shape, space, labels(rows, num_classes, source)).to_json(),
    }


def _to_theirs(ours: Mapping[str, Tensor], depth: int) -> Iterator[tuple[str, Tensor]]:
    for end in ("weight", "bias"):
        for our, their in OUTSIDE.items():
            yield f"{their}.{end}", ours[f"{our}.{end}"]
        for i in range(depth):
            for our, their in IN_BLOCK.items():
                yield f"transformer_blocks.{i}.{their}.{end}", ours[f"blocks.{i}.{our}.{end}"]
            for our, their in IN_EVERY_BLOCK.items():
                yield f"transformer_blocks.{i}.{their}.{end}", ours[f"{our}.{end}"]
            qkv = ours[f"blocks.{i}.attn.qkv.{end}"].chunk(3)
            for letter, tensor in zip("qkv", qkv, strict=True):
                yield f"transformer_blocks.{i}.attn1.to_{letter}.{end}", tensor
    for i in range(depth):
        yield f"transformer_blocks.{i}.{THEIR_TABLE}", ours[OUR_TABLE]


def _to_ours(theirs: Mapping[str, Tensor], depth: int, source: str) -> dict[str, Tensor]:
    """Rename and join; every tensor must be used, and the blocks' embedders must be equal."""
    left = dict(theirs)
    left.pop("pos_embed.pos_embed", None)  # stored by old folders; always sin-cos

    def take(key: str) -> Tensor:
        if key not in left:
            raise ValueError(f"{source} does not fit a DiT of {depth} blocks: {key} is missing")
        return left.pop(key)

    def take_equal(their: str) -> Tensor:
        copies = [take(f"transformer_blocks.{i}.{their}") for i in range(depth)]
        for i, copy in enumerate(copies):
            if not torch.equal(copy, copies[0]):
                raise ValueError(
                    f"{source} cannot be a DiT here: {their} of block {i} differs from that of"
                    " block 0, and this model has one embedder for all blocks"
                )
        return copies[0]

    ours = {OUR_TABLE: take_equal(THEIR_TABLE)}
    for end in ("weight", "bias"):
        for our, their in OUTSIDE.items():
            ours[f"{our}.{end}"] = take(f"{their}.{end}")
        for our, their in IN_EVERY_BLOCK.items():
            ours[f"{our}.{end}"] = take_equal(f"{their}.{end}")
        for i in range(depth):
            for our, their in IN_BLOCK.items():
                ours[f"blocks.{i}.{our}.{end}"] = take(f"transformer_blocks.{i}.{their}.{end}")
            qkv = [take(f"transformer_blocks.{i}.attn1.to_{letter}.{end}") for letter in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(qkv)
    if left:
        raise ValueError(
            f"{source} does not fit a DiT of {depth} blocks: unknown {next(iter(left))}"
        )
    return ours


def _cautions(model: dit.DiT, null_is_theirs: bool) -> Iterator[str]:
    """What diffusers does otherwise with this model, and what to do about it."""
    num_classes = _num_classes(model)
    if num_classes == 0 and not null_is_theirs:
        yield (
            "diffusers' DiT has no unconditional form: this folder has one class whose embedding is"
            " zero; call the transformer with class_labels 0, not through DiTPipeline"
        )
    elif num_classes != 1000 and not null_is_theirs:
        yield (
            "diffusers' DiTPipeline always guides with the null label 1000: for this model of"
            f" {num_classes} classes call the transformer yourself, with the null label"
            f" {num_classes}"
        )
    if num_classes > 0 and not model.facts.conditions["label"].null:
        yield "this model has no null label, so that guidance means nothing: its row is zero"
    if model.config.frequency_shift == 0:
        yield (
            "diffusers spaces the time frequencies by 127 steps, this model by 128: for its exact"
            " outputs set block.norm1.emb.time_proj.downscale_freq_shift = 0 in every block of"
            " transformer_blocks, or train with model.frequency_shift=1"
        )
