"""MDT: the masked diffusion transformer with its side interpolater (Gao et al., arXiv 2303.14389), its first version.

A DiT that is put through two passes a batch. One is a DiT's over all tokens. In the other each sample keeps a random
part of its tokens, and the first blocks see nothing else, so that they cost less; then the side interpolater guesses
the tokens that are missing, a learned mask token in their place, from those that are there; the last blocks work on all
again. The two losses are added; they are of the same draw of time and noise (the original draws the noise anew for
each). Sampling uses the first pass alone.

Beside a DiT there are learned embeddings of the tokens' places, before the first and before the last blocks, and in
every attention a bias of each head by the distance of two tokens. This file knows nothing of noise, losses or data.
"""

# Shape suffixes: B samples, C channels (C' of the output), H height, W width, T tokens, K of them kept, D hidden size,
# N heads, 3 = (seed, step, first slot).

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from speed_engine.data import Facts
from speed_engine.models import dit
from speed_engine.models.parts import packing
from speed_engine.models.parts.blocks import Attention, Block, Recompute, Stream
from speed_engine.models.parts.glue import OPS, Glue
from speed_engine.models.parts.start import initialised

TAKES = dit.TAKES
KERNELS = OPS
COMPUTE_KEYS = dit.COMPUTE_KEYS


class Config(dit.Config):
    """An MDT of one of DiT's sizes."""

    kind: Literal["mdt"] = "mdt"  # pyright: ignore[reportIncompatibleVariableOverride]
    size: str = Field(default="S/2", description=f"one of {', '.join(dit.SIZES)}")
    mask_ratio: float = Field(
        default=0.3, gt=0, lt=1, description="share of the tokens that the masked pass leaves out"
    )
    decoder_depth: int = Field(
        default=2, ge=1, description="last blocks, which see all tokens in both passes"
    )
    # A bias on the attention is what only torch's own computes.
    attention: Literal["sdpa"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="sdpa", description="implementation; torch's own is the one with a bias"
    )
    route: None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, description="a DiT's; an MDT leaves tokens out by its masks"
    )
    products: Literal["native"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="native", description="the blocks' matrix products: in the dtype of the weights"
    )

    @model_validator(mode="after")
    def _decodes(self) -> Config:
        if self.decoder_depth >= self.resolved().depth:
            raise ValueError(
                f"model.decoder_depth {self.decoder_depth} must be below the {self.resolved().depth} blocks there are: "
                "change it or model.depth"
            )
        return self

    def num_kept(self, tokens: int) -> int:
        """Tokens of a sample that the first blocks see in the masked pass."""
        return packing.num_kept(tokens, self.mask_ratio)


class BiasedAttention(Attention):
    """Self-attention with a learned bias of each head by how far apart two tokens lie, in rows and in columns."""

    def __init__(self, hidden_size: int, num_heads: int, grid: int, bias_later: bool) -> None:
        super().__init__(hidden_size, num_heads, "sdpa", bias_later)
        self.grid = grid
        self.distance_bias = nn.Parameter(torch.empty((2 * grid - 1) ** 2, num_heads))

    def forward(self, qkv_BTX: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """kept: int64 [B, K], the places of the tokens that are there; None: all, in order."""
        q, k, v = qkv_BTX.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        place = torch.arange(self.grid**2, device=qkv_BTX.device) if kept_BK is None else kept_BK
        row, column = place // self.grid, place % self.grid
        rows = row[..., :, None] - row[..., None, :] + self.grid - 1
        columns = column[..., :, None] - column[..., None, :] + self.grid - 1
        bias = self.distance_bias[rows * (2 * self.grid - 1) + columns].movedim(-1, -3)
        mixed_BNTX = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(mixed_BNTX.transpose(1, 2).flatten(2))


class MaskableBlock(Block):
    """A DiT's block that knows which tokens it is given: its `places` are `BiasedAttention`'s kept_BK."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_width: int,
        grid: int,
        glue: Glue,
        recompute: Recompute,
    ) -> None:
        super().__init__(hidden_size, num_heads, mlp_width, "sdpa", glue, recompute)
        self.attn = BiasedAttention(hidden_size, num_heads, grid, bias_later=glue.fused)


class MDT(dit.DiT):
    """The whole network; see `dit.DiT`."""

    config: Config

    def __init__(
        self,
        config: Config,
        facts: Facts,
        num_outputs: int,
        device: torch.device,
        dtype: torch.dtype,
        glue: Glue,
    ) -> None:
        super().__init__(config, facts, num_outputs, device, dtype, glue)
        hidden_size, depth, num_heads, _ = config.resolved()
        sizes = (hidden_size, num_heads, int(hidden_size * config.mlp_ratio), self.grid)
        self.blocks = nn.ModuleList(
            MaskableBlock(*sizes, glue, config.recompute) for _ in range(depth)
        )
        self.side_block = MaskableBlock(*sizes, glue, config.recompute)
        del self.pos_embed  # a DiT's is fixed
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, hidden_size))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, self.grid**2, hidden_size))
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """As a DiT's; places begin as DiT's fixed ones, distances count alike, the mask token is small and random."""
        super().initialise(seed)
        self.decoder_pos_embed.copy_(self.pos_embed)
        generator = torch.Generator().manual_seed(seed)
        token = torch.empty(self.mask_token.shape).normal_(0, 0.02, generator=generator)
        self.mask_token.copy_(token)
        for block in (*self.blocks, self.side_block):
            cast("MaskableBlock", block).attn.distance_bias.zero_()

    def projections(self) -> list[nn.Linear]:
        """The adaLN layers of the first blocks, the last ones, the final layer and the side interpolater."""
        side = cast("nn.Linear", self.side_block.get_submodule("adaLN_modulation.1"))
        return [*super().projections(), side]

    def passes(self, seed: int, address: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
        """Over all tokens, and masked by a function of (seed, step, global slot); see `speed_engine.models`."""
        return [
            (1.0, {}),
            (1.0, {"mask_at": packing.address_of(seed, address)}),
        ]

    def kept(self, mask_at_3: Tensor, batch: int) -> Tensor:
        """The places that stay in the masked pass, ascending: int64 [B, K]."""
        tokens = self.grid**2
        return packing.kept(mask_at_3, batch, tokens, self.config.num_kept(tokens))

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
        """As `dit.DiT.forward`. mask_at: int64 [3], the address of the mask in training (`passes`); None: no mask."""
        stream, modulations = self.enter(x_BCHW, time_B, label, vector, (image, image_noise))
        *each, final_BX, side_BX = modulations
        depth = len(self.blocks)
        first = depth - self.config.decoder_depth
        kept_BK, index = None, None
        if mask_at is not None:
            kept_BK = self.kept(mask_at, len(x_BCHW))
            index = packing.index_of(kept_BK, stream.x.shape[2])
            stream = Stream(stream.x.gather(1, index))
        for block, modulation_BX in zip(self.blocks[:first], each[:first], strict=True):
            stream = block(stream, modulation_BX, kept_BK)
        x_BTD = packing.settled(stream, self.glue)
        if index is not None:
            assert kept_BK is not None
            blank_BTD = self.mask_token.to(x_BTD.dtype).expand(len(x_BTD), self.grid**2, -1)
            x_BTD = blank_BTD.scatter(1, index, x_BTD)
        x_BTD = x_BTD + self.decoder_pos_embed.to(x_BTD.dtype)
        if index is not None:
            guessed_BTD = packing.settled(self.side_block(Stream(x_BTD), side_BX), self.glue)
            x_BTD = guessed_BTD.scatter(1, index, x_BTD.gather(1, index))
        stream = Stream(x_BTD)
        for block, modulation_BX in zip(self.blocks[first:], each[first:], strict=True):
            stream = block(stream, modulation_BX)
        return self.leave(stream, final_BX)


def build(
    config: Config,
    facts: Facts,
    num_outputs: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    backends: Mapping[str, str] | None = None,
) -> MDT:
    """An initialised MDT in fp32 on `device`; arguments and errors are those of `dit.build`."""
    dit.check(config, facts)
    settings = (config, facts, num_outputs, torch.device(device), dtype, Glue(backends))
    return initialised(lambda: MDT(*settings), seed, device)


def macs_per_sample(config: Config, facts: Facts, num_outputs: int) -> int:
    """Multiply-adds of one sample's forward pass over all tokens, as sampling makes it; see `dit.macs_per_sample`.

    The side interpolater's adaLN is computed with the others' in one product, and counted.
    """
    return dit.macs_per_sample(config, facts, num_outputs) + 6 * config.resolved().hidden_size ** 2


def training_macs_per_sample(config: Config, facts: Facts, num_outputs: int) -> int:
    """Multiply-adds of both forward passes of a sample in training, the masked one's first blocks on K tokens."""
    hidden, depth, _, patch = config.resolved()
    tokens, mlp_width = (facts.shape[1] // patch) ** 2, int(hidden * config.mlp_ratio)
    spared = packing.spared_macs(tokens, config.mask_ratio, hidden, mlp_width)
    side = packing.block_macs(tokens, hidden, mlp_width)
    once = macs_per_sample(config, facts, num_outputs)
    return 2 * once + side - (depth - config.decoder_depth) * spared
