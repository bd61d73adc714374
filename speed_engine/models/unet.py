"""The U-Net of denoising diffusion, in ADM's form (Dhariwal and Nichol, arXiv 2105.05233, section 3).

Residual blocks on feature maps that are halved from level to level, and doubled again on the way up, where every
block also sees what the way down has kept; attention at chosen resolutions. Time and label are one vector, which shifts
(or scales and shifts) inside every block. The same frame, by its settings, is DDPM++ as EDM trains it (Karras et al.,
arXiv 2206.00364, Table 7). Images lie in channels-last memory throughout. This file knows nothing of noise, losses or
data.
"""

# Shape suffixes: B samples, C channels (C' of the output), H height, W width, D size of the embedding,
# F frequencies, K size of the condition `vector`, 3 = (seed, step, first slot).

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from speed_kernels.attention.op import choose_attention, implementation
from speed_kernels.contract import BackendError, Choice
from torch import Tensor, nn

from speed_engine.data import Facts
from speed_engine.kinds import Section
from speed_engine.models.parts import picture
from speed_engine.models.parts.blocks import Attention, AttentionKind, run
from speed_engine.models.parts.modulation import in_one_piece, project_all
from speed_engine.models.parts.start import initialised
from speed_engine.models.parts.time import TimeEmbedder
from speed_engine.models.parts.unet_blocks import (
    NORM,
    OPS,
    NormSiLU,
    Resampling,
    ResidualBlock,
)
from speed_engine.models.parts.unet_layout import (
    Resample,
    Size,
    macs,
    num_groups,
    num_heads,
    stages,
    vector_widths,
)

SIZES = {
    # SpeeD's U-Net for latents of 256x256 images (arXiv 2405.17403, Table 7).
    "speed": Size(128, (1, 2, 2, 1), 3, (16,), 1, 0, "shift", "conv", "all", 1.0, 1e-5, 0, 0.0),
    # EDM's DDPM++ for 32x32 images.
    "ddpmpp": Size(
        128, (2, 2, 2), 4, (16,), 1, 0, "shift", "block_conv", "last", 0.5**0.5, 1e-6, 1, 0.13
    ),
    # ADM for ImageNet 64x64 (its Table 4).
    "adm64": Size(
        192, (1, 2, 3, 4), 3, (32, 16, 8), 1, 64, "scale_shift", "block", "all", 1.0, 1e-5, 0, 0.1
    ),
    # For 8x8 images on a laptop.
    "tiny": Size(32, (1, 2), 2, (4,), 4, 0, "shift", "conv", "all", 1.0, 1e-5, 0, 0.0),
}
TAKES = ("label", "vector", "augment", "image")
KERNELS = OPS  # the ops of speed_kernels that `build` can use
COMPUTE_KEYS = ("attention", "recompute")


class Config(Section):
    """A U-Net of a published size, or of a size of your own."""

    kind: Literal["unet"] = "unet"
    size: str = Field(default="speed", description=f"one of {', '.join(SIZES)}")
    width: int | None = Field(
        default=None, ge=8, description="channels of the first level, instead of the named size's"
    )
    multipliers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="each level's channels over the width, instead of the named",
    )
    num_blocks: int | None = Field(
        default=None, ge=1, description="residual blocks a level, instead of the named"
    )
    attention_at: tuple[int, ...] | None = Field(
        default=None, description="sides of the feature maps with attention, instead of the named"
    )
    num_heads: int | None = Field(default=None, ge=1, description="instead of the named size's")
    head_width: int | None = Field(
        default=None,
        ge=0,
        description="channels of a head, which then decide num_heads; 0: they do not",
    )
    modulation: Literal["shift", "scale_shift"] | None = Field(
        default=None, description="what time and label do in a block, instead of the named"
    )
    resample: Resample | None = Field(
        default=None, description="how maps are halved and doubled, instead of the named size's way"
    )
    up_attention: Literal["all", "last"] | None = Field(
        default=None,
        description="blocks of a level with attention on the way up, instead of the named",
    )
    residual_scale: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="factor of every residual sum, instead of the named size's",
    )
    norm_eps: float | None = Field(
        default=None, gt=0, description="added to the norms' variances, instead of the named size's"
    )
    frequency_shift: Literal[0, 1] | None = Field(
        default=None, description="time frequencies down to 1/10000 before (0) or at (1) the last"
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="share of activations dropped, instead of the named"
    )
    attention: AttentionKind = Field(
        default="auto", description="implementation; auto measures which is fastest on a GPU"
    )
    recompute: Literal["none", "full"] = Field(
        default="none", description="full: the backward pass computes whole blocks again"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.size not in SIZES:
            raise ValueError(f"model.size {self.size!r} is not one of {', '.join(SIZES)}")
        size = self.resolved()
        if size.width % 2 or min(size.multipliers) < 1:
            raise ValueError("model.width must be even, and model.multipliers at least 1")
        for channels in {size.width * multiplier for multiplier in size.multipliers}:
            heads = num_heads(size, channels)
            if heads < 1 or channels % heads or (size.head_width and channels % size.head_width):
                raise ValueError(
                    f"{channels} channels do not divide into heads: change model.num_heads {size.num_heads} or "
                    f"model.head_width {size.head_width}"
                )
        return self

    def resolved(self) -> Size:
        """The named size with the overrides applied."""
        named = SIZES[self.size]
        given = {key: getattr(self, key) for key in Size._fields}
        return named._replace(**{key: value for key, value in given.items() if value is not None})


class UNet(nn.Module):
    """The whole network; made and initialised by `build`, whose arguments it keeps as attributes.

    `blocks` are the stages of `unet_layout.stages`. The label that means "none", where the data's facts have one, is
    the last row of the table. `attention_choice` says which implementation of attention runs and why.
    """

    def __init__(
        self,
        config: Config,
        facts: Facts,
        num_outputs: int,
        device: torch.device,
        dtype: torch.dtype,
        backends: Mapping[str, str] | None,
    ) -> None:
        super().__init__()
        size = config.resolved()
        self.config, self.facts, self.num_outputs = config, facts, num_outputs
        self.same_anywhere = False
        self.stages = list(stages(size, facts))
        self.dropout = size.dropout
        self._place = (device, dtype)
        channels, embedding = picture.input_channels(facts), 4 * size.width
        self.conv_in = nn.Conv2d(channels, size.width, 3, padding=1)
        self.t_embedder = TimeEmbedder(embedding, size.width // 2, size.frequency_shift)
        self.y_embedder = None
        if (label := facts.conditions.get("label")) is not None:
            self.y_embedder = nn.Embedding(label.num_values + label.null, embedding)
        self.image_embedder = None
        if picture.NAME in facts.conditions:
            self.image_embedder = picture.Embedder(embedding, size.width // 2, size.frequency_shift)
        for name, numbers in vector_widths(facts).items():
            self.add_module(f"{name}_embedder", nn.Linear(numbers, size.width, bias=False))
        self.blocks = nn.ModuleList(
            ResidualBlock(stage, size, number, "sdpa", backends)
            if stage.block
            else Resampling(stage, size)
            for number, stage in enumerate(self.stages)
        )
        norm = None if backends is None else backends[NORM]
        self.norm_out = NormSiLU(size.width * size.multipliers[0], size.norm_eps, norm)
        self.conv_out = nn.Conv2d(size.width * size.multipliers[0], num_outputs, 3, padding=1)
        self.attention_choice = self._attend(config.attention)

    def _attend(self, word: str) -> Choice:
        """Use an implementation of attention; `auto`: what is fastest where there are most tokens.

        Heads differ from level to level. Where some cannot be computed by what `auto` chose, or another process,
        torch's own pick is taken there, and the reason says so. Raises BackendError.
        """
        (device, dtype), size = self._place, self.config.resolved()
        _, height, width = self.facts.shape
        choice: Choice | None = None
        for stage, block in sorted(
            zip(self.stages, self.blocks, strict=True), key=lambda pair: pair[0].level
        ):
            if not stage.attention:
                continue
            tokens = (height >> stage.level) * (width >> stage.level)
            heads = num_heads(size, stage.num_outputs)
            try:
                found = choose_attention(
                    device,
                    word if choice is None else choice.backend,
                    head_dim=stage.num_outputs // heads,
                    num_tokens=tokens,
                    num_heads=heads,
                    dtype=dtype,
                )
            except BackendError as error:
                if choice is None or self.config.attention != "auto":
                    raise
                here = f"; sdpa for {tokens} tokens, as {choice.backend} cannot: {error}"
                if here not in choice.reason:
                    choice = replace(choice, reason=choice.reason + here)
                backend = "sdpa"
            else:
                choice, backend = choice or found, found.backend
            attention = cast("Attention", block.get_submodule("attention.attn"))
            attention.attend = implementation(backend)
        assert choice is not None, "the middle has attention"
        return choice

    def attend_by(self, word: str) -> None:
        """Use another implementation of attention from now on. Raises BackendError."""
        self.attention_choice = self._attend(word)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """ADM's recipe, drawn on the host in the order of names: equal on every device.

        Weights and biases uniform within 1 / sqrt(fan-in), which is torch's default; labels standard normal; norms one
        and zero; zero for the last layer of every branch and of the network. Convolutions go to channels-last memory.
        """
        for convolution in self.modules():
            # 1x1 weights are in both orders already, and would only get odd strides.
            if isinstance(convolution, nn.Conv2d) and convolution.kernel_size != (1, 1):
                convolution.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(torch.empty(module.weight.shape).normal_(generator=generator))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                last = name.endswith(("conv2", "attn.proj", "conv_out"))
                bound = 0.0 if last else module.weight[0].numel() ** -0.5
                for parameter in module.parameters():
                    drawn = torch.empty(parameter.shape)
                    parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def projections(self) -> list[nn.Linear]:
        """The layers that tell every block the time and the conditions."""
        return [block.embedding for block in self.blocks if isinstance(block, ResidualBlock)]

    def memory_order(self) -> list[nn.Parameter]:
        """All parameters, in the order in which an engine that keeps them in one buffer should lay them: the weights of
        `projections` together, and their biases, so that they make one product."""
        return in_one_piece(self.projections(), self)

    def passes(self, seed: int, address: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
        """One pass, whose dropout is a function of (seed, step, global slot); see `speed_engine.models`."""
        if self.dropout == 0:
            return [(1.0, {})]
        return [(1.0, {"drop_at": torch.cat([torch.full_like(address[:1], seed), address])})]

    def forward(
        self,
        x_BCHW: Tensor,
        time_B: Tensor,
        *,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        augment: Tensor | None = None,
        image: Tensor | None = None,
        image_noise: Tensor | None = None,
        drop_at: Tensor | None = None,
    ) -> Tensor:
        """Noisy inputs [B, C, H, W] -> output [B, num_outputs, H, W], in channels-last memory.

        time_B: what the network is told of the noise, integer or fp32, of any range. label: int64 [B] in
        [0, num_values), or num_values for "none". vector: fp32 [B, K]; augment: fp32 [B, 9], what was done to the
        pictures. image: fp32 [B, C', h, w], image_noise: fp32 [B], the level of noise in it. Each is given if and only
        if `facts.conditions` has it. drop_at: int64 [3], the address of dropout in
        training (`passes`); without it nothing is dropped. Raises ValueError for inputs that do not fit the model.
        """
        if tuple(x_BCHW.shape[1:]) != self.facts.shape:
            wanted, given = self.facts.shape, tuple(x_BCHW.shape[1:])
            raise ValueError(f"this model takes samples of {wanted}, not {given}")
        if time_B.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"time in {time_B.dtype} would merge steps; give it in float32")
        rows = {"vector": vector, "augment": augment}
        for name, value in (("label", label), ("image", image), *rows.items()):
            if (value is None) == (name in self.facts.conditions):
                told = "needs the condition" if value is None else "does not take the condition"
                raise ValueError(f"this model {told} {name!r}")

        dtype = self.conv_in.weight.dtype
        further = None
        for name, value in rows.items():
            if value is not None:
                added = self.get_submodule(f"{name}_embedder")(value.to(dtype))
                further = added if further is None else further + added
        told_BD = self.t_embedder(time_B, dtype, further)
        if self.y_embedder is not None:
            told_BD = told_BD + self.y_embedder(label)
        x = x_BCHW.to(dtype)
        if self.image_embedder is not None:
            x, level_BD = self.image_embedder(x, (image, image_noise))
            told_BD = told_BD + level_BD
        projected = iter(project_all(F.silu(told_BD), self.projections(), self.same_anywhere))

        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        kept = [x]
        for stage, block in zip(self.stages, self.blocks, strict=True):
            if stage.num_kept:
                x = torch.cat([x, kept.pop()], dim=1)
            if stage.block:
                x = run(self.config.recompute == "full", block, x, next(projected), drop_at)
            else:
                x = block(x)
            if stage.part == "down":
                kept.append(x)
        return self.conv_out(self.norm_out(x))


def build(
    config: Config,
    facts: Facts,
    num_outputs: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    backends: Mapping[str, str] | None = None,
) -> UNet:
    """An initialised U-Net in fp32 on `device`, its convolutions in channels-last memory; the same `seed` gives the
    same weights everywhere.

    facts: of images, with the conditions of `TAKES` that the network will be told. num_outputs: channels of the output.
    dtype: what the products will be computed in, for which the attention is chosen. backends: for the ops of `KERNELS`
    the backend of their fused kernels; None: plain torch, which computes the same. On the `meta` device nothing is
    allocated (to count parameters).
    Raises ValueError where the sample's sides cannot be halved from level to level or channels not be grouped, and
    speed_kernels.contract.BackendError where the attention asked for cannot run.
    """
    _check(config, facts)
    settings = (config, facts, num_outputs, torch.device(device), dtype, backends)
    return initialised(lambda: UNet(*settings), seed, device)


def _check(config: Config, facts: Facts) -> None:
    """Refuse samples and widths that the network cannot have. Raises ValueError."""
    size = config.resolved()
    if len(facts.shape) != 3:
        raise ValueError(
            f"model.kind=unet takes images [C, H, W], and the data are {facts.shape}; choose another model"
        )
    halvings = len(size.multipliers) - 1
    if any(side % 2**halvings or side == 0 for side in facts.shape[1:]):
        sides = "x".join(map(str, facts.shape[1:]))
        raise ValueError(
            f"model.multipliers has {halvings + 1} levels, each of half the size, so height and width must be "
            f"multiples of {2**halvings}, and the data are {sides}; choose fewer levels, or encode the data at "
            "another size"
        )
    for stage in stages(size, facts):
        for channels in (stage.num_inputs, stage.num_outputs):
            if channels < 4 or channels % num_groups(channels):
                raise ValueError(
                    f"{channels} channels do not divide into {max(1, num_groups(channels))} groups of at least 4 for "
                    f"the norms: change model.width {size.width}, to a multiple of 32 say"
                )


def macs_per_sample(config: Config, facts: Facts, num_outputs: int) -> int:
    """Multiply-adds of one forward pass of one sample: convolutions, matrix products and attention.

    Two FLOP each; a training step is about three forward passes.
    """
    _check(config, facts)
    return macs(config.resolved(), facts, num_outputs)
