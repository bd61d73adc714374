"""A DiT to and from a folder of Hugging Face diffusers (`DiTTransformer2DModel`).

The folder is two plain files, a JSON and a safetensors, so diffusers itself is not needed here. Its
layout differs from the public checkpoints': q, k and v are separate, the position embedding is not
stored, and the embedders of time and label are stored once per block. A third file of ours says
what diffusers' JSON cannot, so that a model comes back bit-equal.

One difference is mathematical: diffusers spaces the 128 time frequencies by 10000^(1/127), the
public code by 10000^(1/128). `model.frequency_shift` 1 is diffusers' way.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from speed_engine.atomic_files import atomic, write_text
from speed_engine.models import dit
from speed_engine.weights.file import (
    describe,
    load_into,
    merged,
    named_config,
    read_pt,
    read_safetensors,
    rebuild,
)

SIDECAR = "speed_engine.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
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
OUR_TABLE = "y_embedder.embedding_table.weight"
THEIR_TABLE = "norm1.emb.class_embedder.embedding_table.weight"


def export_diffusers(
    folder: Path | str, model: dit.DiT, weights: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Write `folder` so that `DiTTransformer2DModel.from_pretrained(folder)` loads it.

    `weights` (an EMA, say) replaces the model's own. Returns, and warns of, what diffusers will do
    otherwise than we. Raises ValueError where its DiT cannot hold the model.
    """
    hidden, depth, num_heads, patch = model.config.resolved()
    tensors = merged(model, weights)
    places = dit.position_embedding(hidden, model.grid)
    if (tensors.pop("pos_embed").float() - places).abs().max() > 5e-3:
        raise ValueError("diffusers cannot hold this model: its position embedding is not sin-cos")
    if model.config.mlp_ratio != 4:
        raise ValueError(
            f"diffusers cannot hold this model: its DiT has model.mlp_ratio 4,"
            f" not {model.config.mlp_ratio}"
        )
    # diffusers has a table of num_classes + 1 rows always.
    table = tensors.get(OUR_TABLE, torch.zeros(1, hidden, dtype=places.dtype))
    num_classes = max(model.num_classes, 1)
    tensors[OUR_TABLE] = torch.cat([table, table.new_zeros(num_classes + 1 - len(table), hidden)])
    description = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": num_heads,
        "attention_head_dim": hidden // num_heads,
        "in_channels": model.channels,
        "out_channels": model.channels * (1 + model.learned_variance),
        "num_layers": depth,
        "sample_size": model.sample_size,
        "patch_size": patch,
        "num_embeds_ada_norm": num_classes,
        "norm_eps": 1e-6,
        **FIXED,
    }
    cautions = list(_cautions(model))
    theirs = {key: tensor.clone() for key, tensor in _to_theirs(tensors, depth)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / WEIGHTS) as partial:
        save_file(theirs, partial, {"format": "pt"})
    for name, content in (
        (SIDECAR, {"model": describe(model), "cautions": cautions}),
        ("config.json", description),  # last: without it the folder is no model
    ):
        text = json.dumps(content, indent=2) + "\n"
        write_text(folder / name, text)
    for caution in cautions:
        warnings.warn(caution, stacklevel=2)
    return cautions


def import_diffusers(
    folder: Path | str,
    frequency_shift: Literal[0, 1] | None = None,
    device: torch.device | str = "cpu",
) -> dit.DiT:
    """The DiT of a diffusers folder (the one with `config.json`; `transformer` of a pipeline).

    `frequency_shift`: by default our own folder's, else 1, so that the model computes what
    diffusers computes; give 0 for a folder converted from public weights (`facebook/DiT-XL-2-256`),
    which were trained with 0. Raises ValueError, naming the folder, for anything that is not a
    DiT, or whose blocks hold different embedders.
    """
    folder = Path(folder)
    try:
        if (folder / SIDECAR).exists():
            described = json.loads((folder / SIDECAR).read_text())["model"]
        else:
            described = _described(json.loads((folder / "config.json").read_text()), str(folder))
        if frequency_shift is not None:
            described["config"]["frequency_shift"] = frequency_shift
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} has a JSON file that says nothing usable: {error}") from error
    model = rebuild(described, str(folder), device)
    if not isinstance(model, dit.DiT):
        raise ValueError(f"{folder} holds a {described['config']['kind']}, not a DiT")
    weights = _read(folder)
    depth = len(model.blocks)
    weights = {**_to_ours(weights, depth, str(folder)), "pos_embed": model.pos_embed}
    if model.num_classes == 0:
        del weights[OUR_TABLE]  # the row of zeros that the export added
    elif model.null_label is None:
        weights[OUR_TABLE] = weights[OUR_TABLE][: model.num_classes]
    load_into(model, weights, str(folder))
    return model


def _described(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Our description of the model of a `config.json`. Raises ValueError where it is no DiT."""
    name = config.get("_class_name")
    # Before 2024 a DiT's folder said Transformer2DModel, as other networks' folders did.
    is_dit = name == "DiTTransformer2DModel" or (
        name == "Transformer2DModel" and config.get("norm_type") == FIXED["norm_type"]
    )
    wrong = [f"{key} {config[key]}" for key in FIXED if config.get(key, FIXED[key]) != FIXED[key]]
    if not is_dit or wrong:
        found = f"{name} with {', '.join(wrong)}" if wrong else name
        raise ValueError(f"{source} holds {found}; only a DiTTransformer2DModel can be imported")
    keys = ("num_attention_heads", "attention_head_dim", "num_layers", "patch_size")
    try:
        num_heads, head_dim, depth, patch = (int(config[key]) for key in keys)
        channels = int(config["in_channels"])
        outputs = int(config["out_channels"] or channels)
        sample_size, num_classes = int(config["sample_size"]), int(config["num_embeds_ada_norm"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has a config.json without a usable {error}") from error
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"{source} has {outputs} output channels for {channels} input channels")
    if config.get("norm_eps", 1e-5) != 1e-6:
        warnings.warn(
            f"{source} has norm_eps {config.get('norm_eps', 1e-5)}; the model here uses 1e-6, as"
            " the public checkpoints do",
            stacklevel=3,
        )
    size = named_config(num_heads * head_dim, depth, num_heads, patch) or dit.Config(
        hidden_size=num_heads * head_dim, depth=depth, num_heads=num_heads, patch_size=patch
    )
    return {
        "config": size.model_dump() | {"frequency_shift": 1},
        "channels": channels,
        "sample_size": sample_size,
        "num_classes": num_classes,
        "learned_variance": outputs == 2 * channels,
    }


def _read(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors, from safetensors, or from the pickle of older folders (read as data)."""
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)[0]
    old = folder / "diffusion_pytorch_model.bin"
    if old.exists():
        return read_pt(old)
    raise ValueError(f"{folder} has no weights: {WEIGHTS} is missing")


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


def _cautions(model: dit.DiT) -> Iterator[str]:
    """What diffusers does otherwise with this model, and what to do about it."""
    if model.num_classes == 0:
        yield (
            "diffusers' DiT has no unconditional form: this folder has one class whose embedding is"
            " zero; call the transformer with class_labels 0, not through DiTPipeline"
        )
    elif model.num_classes != 1000:
        yield (
            "diffusers' DiTPipeline always guides with the null label 1000: for this model of"
            f" {model.num_classes} classes call the transformer yourself, with the null label"
            f" {model.num_classes}"
        )
    if model.num_classes > 0 and model.null_label is None:
        yield "this model has no null label, so that guidance means nothing: its row is zero"
    if model.config.frequency_shift == 0:
        yield (
            "diffusers spaces the time frequencies by 127 steps, this model by 128: for its exact"
            " outputs set block.norm1.emb.time_proj.downscale_freq_shift = 0 in every block of"
            " transformer_blocks, or train with model.frequency_shift=1"
        )
