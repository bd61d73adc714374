"""A U-Net to and from a folder of Hugging Face diffusers (`UNet2DModel`), wherever the two are the same network.

diffusers' U-Net has one form: attention in every block of a level or in none, one number of groups in all norms, one
size of head, and a first level as wide as its first convolution. Whatever differs from that, on either side, is refused
with its setting's name; nothing is converted that would compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from speed_engine.data import Facts
from speed_engine.models import unet
from speed_engine.models.parts.unet_layout import (
    Size,
    Stage,
    has_shortcut,
    num_groups,
    num_heads,
    stages,
)
from speed_engine.weights.diffusers_folder import (
    own_header,
    read_json,
    read_weights,
    write_folder,
)
from speed_engine.weights.dit_public import assumed_space, labels
from speed_engine.weights.file import build
from speed_engine.weights.fit import blueprint, filled, merged

CLASS = "UNet2DModel"
TABLE, THEIR_TABLE = "y_embedder.weight", "class_embedding.weight"
# What a U-Net of ours always is, in diffusers' words; None: what diffusers takes where nothing is said.
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
# (resampling, attention) of a level -> diffusers' names of its blocks on the way down and up.
TYPES = {
    ("conv", False): ("DownBlock2D", "UpBlock2D"),
    ("conv", True): ("AttnDownBlock2D", "AttnUpBlock2D"),
    ("resnet", False): ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    ("resnet", True): ("AttnDownBlock2D", "AttnUpBlock2D"),
}
RESAMPLE: dict[str, str] = {"conv": "conv", "block": "resnet"}
OUTSIDE = {
    "conv_in": "conv_in",
    "t_embedder.mlp.0": "time_embedding.linear_1",
    "t_embedder.mlp.2": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
IN_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embedding": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
}
IN_ATTENTION = {"norm": "group_norm", "attn.proj": "to_out.0"}


def export_diffusers(
    folder: Path | str,
    model: Any,
    weights: Mapping[str, Tensor] | None = None,
    *,
    notes: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write `folder` so that `UNet2DModel.from_pretrained(folder)` loads it.

    `weights` (an EMA, say) replaces the model's own. notes: as in `weights.file.save`. Returns, and warns of, what
    diffusers will do otherwise than we. Raises ValueError, naming the setting, where its U-Net is another network.
    """
    _refuse_other_networks(model)
    assert isinstance(model, unet.UNet)
    size, (channels, height, width) = model.config.resolved(), model.facts.shape
    tensors = merged(model, weights)
    levels = [
        TYPES[RESAMPLE[size.resample], attention] for attention in _attention(size, model.facts)
    ]
    label = model.facts.conditions.get("label")
    description = {
        "_class_name": CLASS,
        "sample_size": width if height == width else [height, width],
        "in_channels": channels,
        "out_channels": model.num_outputs,
        "freq_shift": size.frequency_shift,
        "flip_sin_to_cos": True,
        "down_block_types": [down for down, _ in levels],
        "up_block_types": [up for _, up in reversed(levels)],
        "block_out_channels": [size.width * multiplier for multiplier in size.multipliers],
        "layers_per_block": size.num_blocks,
        "downsample_type": RESAMPLE[size.resample],
        "upsample_type": RESAMPLE[size.resample],
        "dropout": size.dropout,
        "attention_head_dim": _head_width(size, model.facts),
        "norm_num_groups": num_groups(size.width),
        "attn_norm_num_groups": num_groups(size.width),  # else scale_shift has no norm there
        "norm_eps": size.norm_eps,
        "resnet_time_scale_shift": "default" if size.modulation == "shift" else "scale_shift",
        "num_class_embeds": None if label is None else label.num_values + label.null,
        **{key: values[0] for key, values in FIXED.items()},
    }
    theirs: dict[str, Tensor] = {}
    for our, their in names(size, model.facts):
        for ending in ("weight", "bias"):
            tensor = tensors.pop(f"{our}.{ending}")
            if our.endswith("attn.qkv"):
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    theirs[f"{their}.to_{letter}.{ending}"] = part.clone()
            else:
                theirs[f"{their}.{ending}"] = tensor
    if label is not None:
        theirs[THEIR_TABLE] = tensors.pop(TABLE)
    assert not tensors, f"{next(iter(tensors))} has no name in diffusers"
    cautions = list(_cautions(model))
    write_folder(folder, model, theirs, description, cautions, notes)
    return cautions


def import_diffusers(
    folder: Path | str,
    frequency_shift: Literal[0, 1] | None = None,
    device: torch.device | str = "cpu",
    num_classes: int | None = None,
) -> unet.UNet:
    """The U-Net of a diffusers folder (the one with `config.json`; `unet` of a pipeline).

    `num_classes`: by default our own folder's, else the last row of the label table is the null label. Raises
    ValueError, naming the folder, for a U-Net that is another network than ours can be, for `frequency_shift`, which
    the folder says itself, and where our own folder was changed.
    """
    folder, source = Path(folder), str(folder)
    if frequency_shift is not None:
        raise ValueError(f"{source} says its freq_shift itself; leave out --frequency-shift")
    weights, config = read_weights(folder), read_json(folder / "config.json")
    own = own_header(folder, weights)
    header = own or _described(config, weights, source, num_classes)
    model = blueprint(lambda on: build(header, source, on), weights, source)
    if not isinstance(model, unet.UNet):
        raise ValueError(f"{source} holds a {header['model']['kind']}, not a U-Net")
    label = model.facts.conditions.get("label")
    if num_classes not in (None, label.num_values if label else 0):
        raise ValueError(
            f"{source} was exported with {label.num_values if label else 0} classes, not {num_classes};"
            " leave out --num-classes"
        )
    ours = _to_ours(weights, model, source)
    if own is None and not config.get("flip_sin_to_cos", True):  # sines come first there
        first = ours["t_embedder.mlp.0.weight"]
        ours["t_embedder.mlp.0.weight"] = torch.cat(first.chunk(2, dim=1)[::-1], dim=1)
    return filled(lambda on: build(header, source, on), ours, source, device)


def names(size: Size, facts: Facts) -> Iterator[tuple[str, str]]:
    """(our name, diffusers' name) of everything that has a weight and a bias; q, k and v are one layer here."""
    yield from OUTSIDE.items()
    count: dict[tuple[str, int], int] = {}
    for number, stage in enumerate(stages(size, facts)):
        place, index = _place(stage, len(size.multipliers)), 0
        if stage.resample:
            block = f"{place}.{stage.resample}samplers.0"
        else:
            index = count[stage.part, stage.level] = count.get((stage.part, stage.level), -1) + 1
            block = f"{place}.resnets.{index}"
        if not stage.block:
            yield f"blocks.{number}.conv", f"{block}.conv"
            continue
        for our, their in IN_BLOCK.items():
            yield f"blocks.{number}.{our}", f"{block}.{their}"
        if has_shortcut(size, stage):
            yield f"blocks.{number}.shortcut", f"{block}.conv_shortcut"
        if stage.attention:
            attention = f"{place}.attentions.{index}"
            for our, their in IN_ATTENTION.items():
                yield f"blocks.{number}.attention.{our}", f"{attention}.{their}"
            yield f"blocks.{number}.attention.attn.qkv", attention


def _place(stage: Stage, num_levels: int) -> str:
    """diffusers counts the way up from the smallest maps; resampling belongs to the level that it leaves."""
    if stage.part == "middle":
        return "mid_block"
    if stage.part == "down":
        return f"down_blocks.{stage.level - (stage.resample == 'down')}"
    return f"up_blocks.{num_levels - 1 - stage.level - (stage.resample == 'up')}"


def _to_ours(theirs: Mapping[str, Tensor], model: unet.UNet, source: str) -> dict[str, Tensor]:
    """Rename and join; every tensor must be used."""
    left, ours = dict(theirs), {}

    def take(key: str) -> Tensor:
        if key not in left:
            raise ValueError(f"{source} does not fit its own config.json: {key} is missing")
        return left.pop(key)

    for our, their in names(model.config.resolved(), model.facts):
        for ending in ("weight", "bias"):
            if our.endswith("attn.qkv"):
                parts = [take(f"{their}.to_{letter}.{ending}") for letter in "qkv"]
                ours[f"{our}.{ending}"] = torch.cat(parts)
            else:
                ours[f"{our}.{ending}"] = take(f"{their}.{ending}")
    if model.y_embedder is not None:
        ours[TABLE] = take(THEIR_TABLE)
    if left:
        raise ValueError(f"{source} does not fit its own config.json: unknown {next(iter(left))}")
    return ours


def _attention(size: Size, facts: Facts) -> list[bool]:
    """Whether the blocks of each level have attention."""
    side = max(facts.shape[1:])
    return [side >> level in size.attention_at for level in range(len(size.multipliers))]


def _head_width(size: Size, facts: Facts) -> int | None:
    """diffusers' attention_head_dim: of all heads, or None where every attention has one. Raises ValueError."""
    widths = {stage.num_outputs for stage in stages(size, facts) if stage.attention}
    heads = {num_heads(size, width) for width in widths}
    dims = {width // num_heads(size, width) for width in widths}
    if heads == {1}:
        return None
    if len(dims) > 1:
        raise ValueError(
            "diffusers' U-Net has heads of one size, and model.num_heads gives several here; set model.head_width"
        )
    return dims.pop()


def _refuse_other_networks(model: Any) -> None:
    """Raises ValueError, with the cure, for what diffusers' U-Net cannot be."""
    assert isinstance(model, unet.UNet)
    size = model.config.resolved()
    _head_width(size, model.facts)
    channels = {size.width}
    for stage in stages(size, model.facts):
        channels |= {stage.num_inputs, stage.num_outputs}
    other = None
    if unknown := [name for name in model.facts.conditions if name != "label"]:
        other = f"the condition {unknown[0]!r}"
    elif size.resample not in RESAMPLE:
        other = f"model.resample={size.resample}"
    elif size.residual_scale != 1:
        other = f"model.residual_scale={size.residual_scale:g}"
    elif size.multipliers[0] != 1:
        other = f"model.multipliers that begin with {size.multipliers[0]}"
    elif size.up_attention == "last" and any(_attention(size, model.facts)):
        other = "model.up_attention=last"
    elif len({num_groups(each) for each in channels}) > 1:
        other = f"norms of several numbers of groups, as model.width {size.width} gives them"
    if other is not None:
        raise ValueError(
            f"diffusers' U-Net has no place for {other}; export it with --format safetensors"
        )


def _described(
    config: Any, weights: Mapping[str, Tensor], source: str, num_classes: int | None
) -> dict[str, Any]:
    """Our header for the model of a `config.json`. Raises ValueError where ours cannot be it."""
    if not isinstance(config, dict) or config.get("_class_name") != CLASS:
        raise ValueError(f"{source} holds no {CLASS}")
    for key, values in FIXED.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{source} has {key} {config[key]}, which the U-Net here cannot have ({values[0]})"
            )
    try:
        widths = [int(each) for each in config["block_out_channels"]]
        down, up = list(config["down_block_types"]), list(config["up_block_types"])[::-1]
        sample = config["sample_size"]
        height, width = map(int, sample if isinstance(sample, list) else (sample, sample))
        channels, outputs = int(config["in_channels"]), int(config["out_channels"])
        resample, groups = str(config.get("downsample_type", "conv")), config["norm_num_groups"]
        head_width, scale = config["attention_head_dim"], config["resnet_time_scale_shift"]
        settings: dict[str, Any] = {
            "width": widths[0],
            "multipliers": [each // widths[0] for each in widths],
            "num_blocks": int(config["layers_per_block"]),
            "num_heads": 1,
            "head_width": int(head_width or 0),
            "modulation": "shift" if scale == "default" else scale,
            "up_attention": "all",
            "residual_scale": 1.0,
            "norm_eps": float(config["norm_eps"]),
            "frequency_shift": config.get("freq_shift", 0),
            "dropout": float(config.get("dropout", 0.0)),
        }
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{source} has a config.json without a usable {error}") from error
    attention = [name.startswith("Attn") for name in down]
    types = [TYPES.get((resample, each)) for each in attention]
    wrong = None
    if types != list(zip(down, up, strict=False)) or not len(widths) == len(down) == len(up):
        wrong = f"down_block_types {down} and up_block_types {up[::-1]}, resampled by {resample},"
    elif any(each % widths[0] for each in widths):
        wrong = f"block_out_channels {widths}, no multiples of the first"
    elif any(num_groups(each) != groups for each in widths):
        wrong = f"norm_num_groups {groups}, where the norms here have {num_groups(widths[0])}"
    elif scale != "default" and config.get("attn_norm_num_groups") != groups:
        wrong = "no norm before the middle's attention"
    elif config.get("attn_norm_num_groups") not in (None, groups):
        wrong = f"attn_norm_num_groups {config['attn_norm_num_groups']}"
    elif config.get("upsample_type", "conv") != resample:
        wrong = f"upsample_type {config.get('upsample_type')} with downsample_type {resample}"
    elif config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        wrong = f"time_embedding_dim {config['time_embedding_dim']}"
    elif outputs not in (channels, 2 * channels):
        wrong = f"{outputs} output channels for {channels} input channels"
    if wrong is not None:
        raise ValueError(f"{source} has {wrong}, which the U-Net here cannot have")
    settings["resample"] = {their: our for our, their in RESAMPLE.items()}[resample]
    side = max(height, width)
    settings["attention_at"] = [side >> level for level, each in enumerate(attention) if each]
    table = weights.get(THEIR_TABLE)
    told = labels(None if table is None else len(table), num_classes, source)
    return {
        "model": {"kind": "unet", "config": settings, "num_outputs": outputs},
        "facts": Facts((channels, height, width), assumed_space(channels), told).to_json(),
    }


def _cautions(model: unet.UNet) -> Iterator[str]:
    """What diffusers does otherwise with this model."""
    if model.dropout:
        yield (
            "diffusers draws dropout from torch's stream, this model from addresses: training goes on alike, but not "
            "with the same numbers"
        )
    label = model.facts.conditions.get("label")
    if label is not None and label.null:
        yield f"diffusers' pipelines do not guide a {CLASS}: its null label is {label.num_values}"
