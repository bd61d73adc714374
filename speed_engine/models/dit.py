"""DiT: the diffusion transformer with adaLN-Zero (Peebles and Xie, arXiv 2212.09748).

A latent image is cut into patches, each patch becomes a token, a plain transformer works on the
tokens, and each token becomes a patch of the output. Time and label enter only through adaLN: they
give every block a shift, a scale and a gate for each of its two branches, and the gates start at
zero, so that an untrained block is the identity. Parameter names and shapes are those of the public
DiT checkpoints. This file knows nothing of noise, losses or data.
"""

# Shape suffixes: B samples, C channels (C' of the output), H height, W width, T tokens, D hidden
# size, N heads, K size of a head, F frequencies of the time embedding.

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from speed_kernels.attention.op import choose_attention, implementation
from torch import Tensor, nn

from speed_engine.data import Facts
from speed_engine.kinds import Section
from speed_engine.models.parts import packing, picture
from speed_engine.models.parts.blocks import AttentionKind, Block, FinalLayer, Recompute, Stream
from speed_engine.models.parts.fp8 import with_products
from speed_engine.models.parts.glue import OPS, Glue
from speed_engine.models.parts.modulation import in_one_piece, project_all
from speed_engine.models.parts.picture import Pictures
from speed_engine.models.parts.sizes import SIZES, Size
from speed_engine.models.parts.start import initialised
from speed_engine.models.parts.time import TimeEmbedder
from speed_engine.models.parts.tokens import PatchProjection, image_of, position_embedding

TAKES = ("label", "vector", "image")
KERNELS = OPS  # the ops of speed_kernels that `build` can use
COMPUTE_KEYS = ("attention", "residual", "recompute", "products")
EMBEDDERS = ("t_embedder", "y_embedder", "vector_embedder", "text_embedder", "image_embedder")
NUM_FREQUENCIES = 128  # a cosine and a sine of each: 256 numbers tell the network the time


class Config(Section):
    """A DiT of a published size, or of a size of your own."""

    kind: Literal["dit"] = "dit"
    size: str = Field(default="XL/2", description=f"one of {', '.join(SIZES)}")
    hidden_size: int | None = Field(default=None, ge=4, description="instead of the named size's")
    depth: int | None = Field(
        default=None, ge=1, description="number of blocks, instead of the named"
    )
    num_heads: int | None = Field(default=None, ge=1, description="instead of the named size's")
    patch_size: int | None = Field(default=None, ge=1, description="instead of the named size's")
    mlp_ratio: float = Field(default=4.0, gt=0, description="width of the MLP over the hidden size")
    frequency_shift: Literal[0, 1] = Field(
        default=0, description="time frequencies: 0 as in the public checkpoints, 1 as in diffusers"
    )
    attention: AttentionKind = Field(
        default="auto", description="implementation; auto measures which is fastest on a GPU"
    )
    residual: Literal["fp32", "compute"] = Field(
        default="fp32", description="dtype of the residual stream: fp32, or that of the products"
    )
    products: Literal["native", "fp8_tensor", "fp8_row"] = Field(
        default="native",
        description="the blocks' matrix products: in the dtype of the weights, or in e4m3 with a "
        "scale a tensor or a row (an experiment; GPUs from sm_89 on, and slowly on CPUs)",
    )
    route: tuple[int, int] | None = Field(
        default=None,
        description="[i, j]: in training a part of the tokens goes around blocks i to j - 1, counted from 0 (TREAD, "
        "arXiv 2501.04765); null: none does",
    )
    route_ratio: float = Field(
        default=0.5, gt=0, lt=1, description="share of the tokens that go around, with `route`"
    )
    recompute: Recompute = Field(
        default="none",
        description="what the backward pass computes again instead of keeping it: none; selective: "
        "norms and GELU, which cost no product; full: whole blocks",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.size not in SIZES:
            raise ValueError(f"model.size {self.size!r} is not one of {', '.join(SIZES)}")
        hidden, heads = self.resolved().hidden_size, self.resolved().num_heads
        if hidden % 4 != 0 or hidden % heads != 0:
            raise ValueError(
                f"model.hidden_size {hidden} must be a multiple of 4 and of model.num_heads {heads}"
            )
        first, end = self.route or (0, 1)
        if not 0 <= first < end <= self.resolved().depth:
            raise ValueError(
                f"model.route {[first, end]} must be two numbers of blocks, the first below the second, from 0 to "
                f"{self.resolved().depth}"
            )
        return self

    def resolved(self) -> Size:
        """The named size with the overrides applied."""
        named = SIZES[self.size]
        return Size(*(getattr(self, key) or getattr(named, key) for key in Size._fields))


class DiT(nn.Module):
    """The whole network; made and initialised by `build`, whose arguments it keeps as attributes.

    The label that means "none", where the data's facts have one, is the last row of the table.
    `attention_choice` says which implementation of attention runs and why.
    """

    def __init__(
        self,
        config: Config,
        facts: Facts,
        num_outputs: int,
        device: torch.device,
        dtype: torch.dtype,
        glue: Glue,
    ) -> None:
        super().__init__()
        hidden_size, depth, num_heads, patch_size = config.resolved()
        head_dim, mlp_width = hidden_size // num_heads, int(hidden_size * config.mlp_ratio)
        self.sample_size = facts.shape[1]
        self.grid = self.sample_size // patch_size
        self.config, self.facts, self.num_outputs = config, facts, num_outputs
        self.same_anywhere = False
        self.glue = glue
        tokens = self.grid**2
        self.choose_attention = functools.partial(
            choose_attention,
            device,
            head_dim=head_dim,
            num_tokens=tokens,
            num_heads=num_heads,
            dtype=dtype,
        )
        self.attention_choice = self.choose_attention(config.attention)
        channels = picture.input_channels(facts)
        projection = PatchProjection(channels, hidden_size, patch_size, stride=patch_size)
        self.x_embedder = nn.Sequential(OrderedDict(proj=projection))
        self.t_embedder = TimeEmbedder(hidden_size, NUM_FREQUENCIES, config.frequency_shift)
        self.y_embedder = self.vector_embedder = self.image_embedder = None
        if (label := facts.conditions.get("label")) is not None:
            table = nn.Embedding(label.num_values + label.null, hidden_size)
            self.y_embedder = nn.Sequential(OrderedDict(embedding_table=table))
        if (vector := facts.conditions.get("vector")) is not None:
            (width,) = vector.arrays["vector"].shape
            self.vector_embedder = nn.Linear(width, hidden_size, bias=False)
        if picture.NAME in facts.conditions:
            frequencies = (NUM_FREQUENCIES, config.frequency_shift)
            self.image_embedder = picture.Embedder(hidden_size, *frequencies)
        self.pos_embed = nn.Buffer(torch.empty(1, self.grid**2, hidden_size))
        sizes = (hidden_size, num_heads, mlp_width, self.attention_choice.backend)
        self.blocks = nn.ModuleList(Block(*sizes, glue, config.recompute) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * num_outputs, glue)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """The paper's recipe, drawn on the host in the order of names: equal on every device.

        Xavier-uniform for matrices (the patch projection is one), normal with deviation 0.02 for
        the conditions' weights and the time MLP, zero for all biases, every adaLN and the last layer.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
                weight.zero_()
            elif name.startswith(EMBEDDERS):
                weight.copy_(torch.empty(weight.shape).normal_(0, 0.02, generator=generator))
            else:
                drawn = torch.empty(weight.flatten(1).shape)
                nn.init.xavier_uniform_(drawn, generator=generator)
                weight.copy_(drawn.view(weight.shape))
        self.pos_embed.copy_(position_embedding(self.pos_embed.shape[2], self.grid))

    def attend_by(self, word: str) -> None:
        """Use another implementation of attention from now on. Raises BackendError."""
        self.attention_choice = self.choose_attention(word)
        for block in self.blocks:
            cast("Block", block).attn.attend = implementation(word)

    def projections(self) -> list[nn.Linear]:
        """The adaLN layers of all blocks and of the last layer."""
        owners = (*self.blocks, self.final_layer)
        return [cast("nn.Linear", owner.get_submodule("adaLN_modulation.1")) for owner in owners]

    def memory_order(self) -> list[nn.Parameter]:
        """All parameters, in the order in which an engine that keeps them in one buffer should lay
        them: the adaLN weights together, and their biases, so that they make one product."""
        return in_one_piece(self.projections(), self)

    def forward(
        self,
        x_BCHW: Tensor,
        time_B: Tensor,
        *,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
        image_noise: Tensor | None = None,
        mask_at: Tensor | None = None,
    ) -> Tensor:
        """Noisy inputs [B, C, H, W] -> output [B, num_outputs, H, W].

        time_B: what the network is told of the noise, integer or fp32, of any range. label: int64
        [B] in [0, num_values), or num_values for "none". vector: fp32 [B, K]. image: fp32 [B, C', h, w], image_noise:
        fp32 [B], the level of noise in it. Each is given if and only if `facts.conditions` has it. mask_at: int64 [3],
        the address of the tokens that go around (`passes`); None: none does. Raises ValueError for what does not fit.
        """
        stream, modulations = self.enter(x_BCHW, time_B, label, vector, (image, image_noise))
        stream = self.through(stream, modulations, mask_at)
        return self.leave(stream, next(modulations))

    def through(
        self, stream: Stream, modulations: Iterator[Tensor], mask_at: Tensor | None, *places: Tensor
    ) -> Stream:
        """Behind all blocks, each with its own of `modulations` and all of `places`; see `forward` for mask_at."""

        def behind(blocks: Iterable[nn.Module], stream: Stream) -> Stream:
            for block in blocks:
                stream = block(stream, next(modulations), *places)
            return stream

        if mask_at is None or self.config.route is None:
            return behind(self.blocks, stream)
        first, end = self.config.route
        routed = functools.partial(behind, self.blocks[first:end])
        stream = behind(self.blocks[:first], stream)
        stream = packing.around(routed, stream, mask_at, self.config.route_ratio, self.glue)
        return behind(self.blocks[end:], stream)

    def passes(self, seed: int, address: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
        """One; with `route` tokens go around by (seed, step, global slot); see `speed_engine.models`."""
        routed = self.config.route is not None
        return [(1.0, {"mask_at": packing.address_of(seed, address)} if routed else {})]

    def enter(
        self,
        x_BCHW: Tensor,
        time_B: Tensor,
        label: Tensor | None,
        vector: Tensor | None,
        image: Pictures,
        told_BD: Tensor | None = None,
    ) -> tuple[Stream, Iterator[Tensor]]:
        """The tokens, and what time and conditions tell each of `projections`, in order. Raises as `forward`.

        told: what a larger network adds to the embedding of the time, as labels are."""
        if tuple(x_BCHW.shape[1:]) != self.facts.shape:
            wanted, given = self.facts.shape, tuple(x_BCHW.shape[1:])
            raise ValueError(f"this model takes samples of {wanted}, not {given}")
        if time_B.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(f"time in {time_B.dtype} would merge steps; give it in float32")
        self.refuse_missing(label=label, vector=vector, image=image[0])
        dtype = self.dtype
        c_BD = self.t_embedder(time_B, dtype)
        if self.y_embedder is not None:
            c_BD = c_BD + self.y_embedder(label)
        if self.vector_embedder is not None:
            assert vector is not None
            c_BD = c_BD + self.vector_embedder(vector.to(dtype))
        x_BCHW = x_BCHW.to(dtype)
        if self.image_embedder is not None:
            x_BCHW, level_BD = self.image_embedder(x_BCHW, image)
            c_BD = c_BD + level_BD
        if told_BD is not None:
            c_BD = c_BD + told_BD
        c_BD = F.silu(c_BD)
        x_BTD = self.x_embedder(x_BCHW)
        if self.config.residual == "fp32":
            x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        stream = Stream(x_BTD + self.pos_embed.to(x_BTD.dtype))
        return stream, project_all(c_BD, self.projections(), self.same_anywhere)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, not the buffers: DeepSpeed's bf16 leaves those in fp32."""
        return cast("PatchProjection", self.x_embedder[0]).weight.dtype

    def refuse_missing(self, **conditions: Tensor | None) -> None:
        """Each must be given if and only if the network was made for it. Raises ValueError."""
        for name, value in conditions.items():
            if (value is None) == (name in self.facts.conditions):
                told = "needs the condition" if value is None else "does not take the condition"
                raise ValueError(f"this model {told} {name!r}")

    def leave(self, stream: Stream, modulation_BX: Tensor) -> Tensor:
        """The last layer, and the tokens as an image [B, num_outputs, H, W]."""
        patch = self.sample_size // self.grid
        return image_of(self.final_layer(stream, modulation_BX), self.grid, patch)


def build(
    config: Config,
    facts: Facts,
    num_outputs: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    backends: Mapping[str, str] | None = None,
) -> DiT:
    """An initialised DiT in fp32 on `device`; the same `seed` gives the same weights everywhere.

    facts: of square images, with the conditions of `TAKES` that the network will be told.
    num_outputs: channels of the output. dtype: what the products will be computed in, for which
    the attention is chosen. backends: for the ops of `KERNELS`, between the products, the backend
    of their fused kernels; None: plain torch, which computes the same. On the `meta` device nothing
    is allocated (to count parameters).
    Raises ValueError where the sample is not square or not a whole number of patches or the products
    asked for cannot run on `device`, and
    speed_kernels.contract.BackendError where the attention asked for cannot run.
    """
    check(config, facts)
    settings = (config, facts, num_outputs, torch.device(device), dtype, Glue(backends))
    return with_products(initialised(lambda: DiT(*settings), seed, device), config.products)


def check(config: Config, facts: Facts) -> None:
    """Refuse samples that are no square of whole patches. Raises ValueError."""
    if len(facts.shape) != 3 or facts.shape[1] != facts.shape[2]:
        size = "x".join(map(str, facts.shape[1:]))
        raise ValueError(
            f"model.kind={config.kind} takes square images, and the data are {size}; encode them square, or "
            "choose another model"
        )
    patch, size = config.resolved().patch_size, facts.shape[1]
    if size < patch or size % patch != 0:
        raise ValueError(
            f"model.patch_size {patch} does not divide the sample size {size}:"
            " choose another model.size or model.patch_size"
        )


def macs_per_sample(config: Config, facts: Facts, num_outputs: int) -> int:
    """Multiply-adds of one forward pass of one sample: all matrix products, attention included.

    Two FLOP each; a training step is about three forward passes. The paper's "Gflops" are these.
    """
    check(config, facts)
    hidden, depth, _, patch = config.resolved()
    size, channels = facts.shape[1], picture.input_channels(facts)
    tokens, pixels = (size // patch) ** 2, patch**2 * channels
    branches = 4 * hidden + 2 * int(hidden * config.mlp_ratio) + 2 * tokens
    # Looking up a label multiplies nothing.
    vector = facts.conditions.get("vector")
    width = 0 if vector is None else vector.arrays["vector"].shape[0]
    times = 1 + (picture.NAME in facts.conditions)  # its level of noise is embedded as the time is
    embedders = times * (2 * NUM_FREQUENCIES + hidden) + width + tokens * pixels
    last = 2 * hidden + tokens * patch**2 * num_outputs
    return hidden * (embedders + depth * (tokens * branches + 6 * hidden) + last)


def training_macs_per_sample(config: Config, facts: Facts, num_outputs: int) -> int:
    """As `macs_per_sample`, with the blocks of `route` on the tokens that stay."""
    hidden, _, _, patch = config.resolved()
    first, end = config.route or (0, 0)
    tokens, mlp_width = (facts.shape[1] // patch) ** 2, int(hidden * config.mlp_ratio)
    spared = packing.spared_macs(tokens, config.route_ratio, hidden, mlp_width)
    return macs_per_sample(config, facts, num_outputs) - (end - first) * spared


def activation_bytes_per_sample(
    config: Config,
    facts: Facts,
    *,
    precision: Literal["fp32", "bf16", "autocast"] = "bf16",
    fused: bool = True,
) -> int:
    """Estimate of what one sample keeps in memory for the backward pass, in bytes, without the
    allocator's losses; attention never stores its matrix.

    `bf16`: parameters in bf16; `autocast`: fp32 parameters, products in bf16. `fused`: with the
    fused kernels between the products. XL/2 with 32x32 latents and a bf16 stream, 256 samples in
    bf16: 76 GB, with selective recompute 51 GB.
    """
    hidden, depth, _, patch = config.resolved()
    product = 4 if precision == "fp32" else 2  # bytes of a matrix product's operand
    stream = 4 if config.residual == "fp32" else product  # bytes of an element of the stream
    # For both branches the stream, the branch's output and, unless they are computed again, its
    # normed input (plain torch: before and after the modulation); q, k, v and their attention; the
    # MLP before and, unless it is computed again, after GELU.
    again = config.recompute == "selective"
    normed, width = 0 if again else 1 if fused else 2, (1 if again else 2) * config.mlp_ratio
    block = 2 * (stream + (1 + normed) * product) + product * (4 + width)
    kept = block * depth
    if config.recompute == "full":
        kept = (stream + product) * depth + block
    last = stream + (2 if fused else 3) * product
    return int((kept + last) * (facts.shape[1] // patch) ** 2 * hidden)
