"""A DiT that is told captions (`conditions.text`), in one of two ways.

The pooled vector of the caption goes through an MLP and is added to the embedding of the time, as the SpeeD release has
it; so it acts through adaLN alone. With `cross_attention` every block also looks at the caption's tokens, between its
self-attention and its MLP (Chen et al., arXiv 2310.00426), as a branch like the others: normed, shifted, scaled and
gated by adaLN, whose gates start at zero, so that the fused kernels serve it too. Everything else is `dit`'s; without
captions in the data this is a DiT.
"""

# Shape suffixes: as in `dit`; L tokens of the caption, W width of a token.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from speed_engine.data import Facts
from speed_engine.models import dit
from speed_engine.models.parts import packing
from speed_engine.models.parts.blocks import Block, Recompute, Stream, modulation, run
from speed_engine.models.parts.fp8 import with_products
from speed_engine.models.parts.glue import OPS, Glue, Product
from speed_engine.models.parts.start import initialised

TAKES = (*dit.TAKES, "text")
KERNELS = OPS
COMPUTE_KEYS = dit.COMPUTE_KEYS


class Config(dit.Config):
    """A DiT's, and how it reads captions."""

    kind: Literal["dit_text"] = "dit_text"  # pyright: ignore[reportIncompatibleVariableOverride]
    cross_attention: bool = Field(
        default=False,
        description="every block attends to the caption's tokens; false: the pooled vector alone",
    )


class CrossAttention(nn.Module):
    """Queries from the picture's tokens, keys and values from the caption's."""

    def __init__(self, hidden_size: int, num_heads: int, width: int, bias_later: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Product(hidden_size, hidden_size, bias_later=False)
        self.kv = Product(width, 2 * hidden_size, bias_later=False)
        self.proj = Product(hidden_size, hidden_size, bias_later)

    def forward(self, q_BTD: Tensor, caption_BLW: Tensor) -> Tensor:
        """The output of `q` -> the branch [B, T, D]."""
        q_BNTK = q_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(caption_BLW).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BNTK = F.scaled_dot_product_attention(q_BNTK, k, v)
        return self.proj(mixed_BNTK.transpose(1, 2).flatten(2))


class TextBlock(Block):
    """A DiT's block with a third branch between the two: `places` is the caption's tokens [B, L, W]."""

    SCALES = (9, (1, 4, 7))

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_width: int,
        attention: str,
        glue: Glue,
        recompute: Recompute,
        width: int,
    ) -> None:
        super().__init__(hidden_size, num_heads, mlp_width, attention, glue, recompute)
        self.cross = CrossAttention(hidden_size, num_heads, width, bias_later=glue.fused)
        self.adaLN_modulation = modulation(hidden_size, 9)

    def _forward(
        self, modulation_BX: Tensor, places: tuple[Tensor | None, ...], *stream: Any
    ) -> Stream:
        (caption_BLW,) = places
        assert caption_BLW is not None
        parts = modulation_BX.chunk(9, 1)
        whole, enter, leave = self._ways()
        x, qkv = run(whole, enter, self.attn.qkv, *parts[:2], *stream)
        pending = (x, self.attn(qkv), self.attn.proj.bias, parts[2])
        x, q = run(whole, enter, self.cross.q, *parts[3:5], *pending)
        pending = (x, self.cross(q, caption_BLW), self.cross.proj.bias, parts[5])
        x, hidden = run(whole, enter, self.mlp.fc1, *parts[6:8], *pending)
        return Stream(x, run(whole, leave, hidden), self.mlp.fc2.bias, parts[8])


class DiTText(dit.DiT):
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
        width, length = _caption(config, facts)
        self.text_embedder = None
        self.crossing = length > 0
        if width:
            first, last = nn.Linear(width, hidden_size), nn.Linear(hidden_size, hidden_size)
            self.text_embedder = nn.Sequential(first, nn.GELU(approximate="tanh"), last)
        if self.crossing:
            sizes = (hidden_size, num_heads, int(hidden_size * config.mlp_ratio))
            how = (self.attention_choice.backend, glue, config.recompute)
            self.blocks = nn.ModuleList(TextBlock(*sizes, *how, width) for _ in range(depth))

    def forward(
        self,
        x_BCHW: Tensor,
        time_B: Tensor,
        *,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        image: Tensor | None = None,
        image_noise: Tensor | None = None,
        text: Tensor | None = None,
        text_tokens: Tensor | None = None,
        mask_at: Tensor | None = None,
    ) -> Tensor:
        """As `dit.DiT.forward`. text [B, W], text_tokens [B, L, W]: of the captions, in any floating dtype; tokens are
        looked at with `cross_attention` alone."""
        self.refuse_missing(text=text)
        told_BD, places = None, ()
        if self.text_embedder is not None:
            told_BD = self.text_embedder(cast("Tensor", text).to(self.dtype))
        if self.crossing:
            if text_tokens is None:
                raise ValueError("this model needs text_tokens, the tokens of the captions")
            places = (text_tokens.to(self.dtype),)
        pictures = (image, image_noise)
        stream, modulations = self.enter(x_BCHW, time_B, label, vector, pictures, told_BD)
        stream = self.through(stream, modulations, mask_at, *places)
        return self.leave(stream, next(modulations))


def build(
    config: Config,
    facts: Facts,
    num_outputs: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    backends: Mapping[str, str] | None = None,
) -> DiTText:
    """An initialised network in fp32 on `device`; arguments and errors are those of `dit.build`, and ValueError for
    `cross_attention` on data that hold no tokens."""
    dit.check(config, facts)
    settings = (config, facts, num_outputs, torch.device(device), dtype, Glue(backends))
    network = initialised(lambda: DiTText(*settings), seed, device)
    return with_products(network, config.products)


def _caption(config: Config, facts: Facts) -> tuple[int, int]:
    """(width of the caption's vectors, tokens that the blocks attend to); 0 where there are none. Raises ValueError."""
    if "text" not in facts.conditions:
        return 0, 0
    arrays = facts.conditions["text"].arrays
    width = arrays["text"].shape[-1]
    if not config.cross_attention:
        return width, 0
    if "text_tokens" not in arrays:
        raise ValueError(
            "model.cross_attention=true needs the tokens of the captions, and the data hold pooled vectors alone "
            "(or conditions.text.tokens=false leaves them out); encode without --pooled-only, or set it to false"
        )
    return width, arrays["text_tokens"].shape[1]


def macs_per_sample(config: Config, facts: Facts, num_outputs: int) -> int:
    """Multiply-adds of one sample's forward pass; see `dit.macs_per_sample`."""
    width, length = _caption(config, facts)
    hidden, depth, _, patch = config.resolved()
    tokens = (facts.shape[1] // patch) ** 2
    total = dit.macs_per_sample(config, facts, num_outputs)
    if width:
        total += hidden * (width + hidden)
    if length:
        of_picture, of_caption = 2 * hidden**2 + 2 * length * hidden, 2 * width * hidden
        total += depth * (tokens * of_picture + length * of_caption + 3 * hidden**2)
    return total


def training_macs_per_sample(config: Config, facts: Facts, num_outputs: int) -> int:
    """As `macs_per_sample`, with the blocks of `route` on the tokens that stay."""
    hidden, _, _, patch = config.resolved()
    _, length = _caption(config, facts)
    first, end = config.route or (0, 0)
    tokens = (facts.shape[1] // patch) ** 2
    around = tokens - packing.num_kept(tokens, config.route_ratio)
    crossing = around * (2 * hidden**2 + 2 * length * hidden) if length else 0
    plain = dit.macs_per_sample(config, facts, num_outputs)
    spared = plain - dit.training_macs_per_sample(config, facts, num_outputs)
    return macs_per_sample(config, facts, num_outputs) - spared - (end - first) * crossing


def activation_bytes_per_sample(
    config: Config,
    facts: Facts,
    *,
    precision: Literal["fp32", "bf16", "autocast"] = "bf16",
    fused: bool = True,
) -> int:
    """See `dit.activation_bytes_per_sample`. The third branch keeps the stream, its output, its normed input, q and
    their attention, and of the caption the tokens, k and v."""
    own = dit.activation_bytes_per_sample(config, facts, precision=precision, fused=fused)
    width, length = _caption(config, facts)
    if not length:
        return own
    hidden, depth, _, patch = config.resolved()
    product = 4 if precision == "fp32" else 2
    stream = 4 if config.residual == "fp32" else product
    normed = 0 if config.recompute == "selective" else 1 if fused else 2
    picture = (stream + (3 + normed) * product) * (facts.shape[1] // patch) ** 2 * hidden
    block = picture + 2 * product * length * hidden
    kept = 1 if config.recompute == "full" else depth
    return own + kept * block + product * length * width
