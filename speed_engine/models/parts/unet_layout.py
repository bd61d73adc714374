"""What a U-Net consists of, stage by stage: the one description that the network, its cost and other
libraries' formats are made from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from speed_engine.data import Facts
from speed_engine.models.parts import picture

VECTORS = (
    "vector",
    "augment",
)  # conditions that are rows of numbers, added to the time's sinusoids

# How a feature map is halved or doubled, and what goes with it:
#   conv         a 3x3 convolution, of stride two or after repeating (DDPM, ADM's default)
#   pool         the mean of 2x2, or repeating, alone
#   block        a residual block, around its first convolution (ADM, resblock_updown)
#   block_conv   the same with a 1x1 convolution on the way around it (EDM's DDPM++)
Resample = Literal["conv", "pool", "block", "block_conv"]


class Size(NamedTuple):
    """A shape of U-Net; see the fields of `unet.Config`."""

    width: int
    multipliers: tuple[int, ...]
    num_blocks: int
    attention_at: tuple[int, ...]
    num_heads: int
    head_width: int
    modulation: Literal["shift", "scale_shift"]
    resample: Resample
    up_attention: Literal["all", "last"]
    residual_scale: float
    norm_eps: float
    frequency_shift: Literal[0, 1]
    dropout: float


class Stage(NamedTuple):
    """One stage: a residual block, perhaps with attention, or the resampling between two levels."""

    part: Literal["down", "middle", "up"]
    level: int  # of its output; feature maps of level l are 2^l times smaller than the sample
    num_inputs: int  # channels, those of a kept map included
    num_outputs: int
    resample: Literal["", "down", "up"] = ""
    block: bool = True  # whether a residual block; else resampling alone
    num_kept: int = 0  # channels of a kept map of the way down, which is joined to the input
    attention: bool = False


def stages(size: Size, facts: Facts) -> Iterator[Stage]:
    """The stages in the order of computation, between the first convolution and the head.

    The output of the first convolution and of every stage on the way down is kept; the stages with
    `num_kept` take them, the last one first.
    """
    side, last = max(facts.shape[1:]), len(size.multipliers) - 1
    blocks = size.resample in ("block", "block_conv")
    channels, kept = size.width, [size.width]
    for level, multiplier in enumerate(size.multipliers):
        width, attention = size.width * multiplier, side >> level in size.attention_at
        for _ in range(size.num_blocks):
            yield Stage("down", level, channels, width, attention=attention)
            channels = width
            kept.append(channels)
        if level < last:
            yield Stage("down", level + 1, channels, channels, "down", blocks)
            kept.append(channels)
    yield Stage("middle", last, channels, channels, attention=True)
    yield Stage("middle", last, channels, channels)
    for level in reversed(range(last + 1)):
        width, at = size.width * size.multipliers[level], side >> level in size.attention_at
        for number in range(size.num_blocks + 1):
            attention = at and (size.up_attention == "all" or number == size.num_blocks)
            more = kept.pop()
            yield Stage("up", level, channels + more, width, num_kept=more, attention=attention)
            channels = width
        if level > 0:
            yield Stage("up", level - 1, channels, channels, "up", blocks)


def num_heads(size: Size, channels: int) -> int:
    """Heads of an attention over so many channels."""
    return channels // size.head_width if size.head_width else size.num_heads


def num_groups(channels: int) -> int:
    """Groups of a norm: 32, of four channels at least (as EDM; ADM's 32 wherever it has a norm)."""
    return min(32, channels // 4)


def macs(size: Size, facts: Facts, num_outputs: int) -> int:
    """Multiply-adds of one sample's forward pass: convolutions, matrix products and attention."""
    channels, (height, width) = picture.input_channels(facts), facts.shape[1:]
    embedding = 4 * size.width
    times = 1 + (picture.NAME in facts.conditions)  # its level of noise is embedded as the time is
    total = times * (size.width * embedding + embedding**2)
    total += size.width * sum(vector_widths(facts).values())
    head = size.multipliers[0] * num_outputs
    total += 9 * size.width * (channels + head) * height * width
    for stage in stages(size, facts):
        pixels = (height >> stage.level) * (width >> stage.level)
        inputs, outputs = stage.num_inputs, stage.num_outputs
        if stage.block:
            projections = outputs * (1 + (size.modulation == "scale_shift"))
            total += 9 * (inputs + outputs) * outputs * pixels + embedding * projections
            total += inputs * outputs * pixels * has_shortcut(size, stage)
        else:
            total += 9 * inputs * outputs * pixels * (size.resample == "conv")
        if stage.attention:
            total += 4 * outputs**2 * pixels + 2 * outputs * pixels**2
    return total


def vector_widths(facts: Facts) -> dict[str, int]:
    """Of the `VECTORS` that the network is told, how many numbers each has."""
    return {
        name: facts.conditions[name].arrays[name].shape[0]
        for name in VECTORS
        if name in facts.conditions
    }


def has_shortcut(size: Size, stage: Stage) -> bool:
    """Whether a block's input is led around it through a 1x1 convolution."""
    projected = size.resample == "block_conv" and stage.resample != ""
    return stage.num_inputs != stage.num_outputs or projected
