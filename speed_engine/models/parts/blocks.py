"""The transformer block of a DiT with adaLN-Zero, and what it is made of.

A block ends with its last branch not yet added to the residual stream: adding it, and the next
norm, are one pass over memory, which the next block begins with.
"""

# Shape suffixes: B samples, T tokens, 3 = (q, k, v), D hidden size, N heads, K size of a head.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from speed_kernels.attention.op import implementation
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from speed_engine.models.parts.glue import Glue, Normed, Product

Recompute = Literal["none", "selective", "full"]
# The word of a configuration: an implementation of speed_kernels.attention, or the fastest that there is.
AttentionKind = Literal[
    "auto", "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "flash3", "flash4", "xformers"
]


class Stream(NamedTuple):
    """The residual stream [B, T, D] and, after the first block, a branch still to be added to it:
    branch [B, T, D], the bias [D] of the product that made it, its gate [B, D]."""

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None


def advance(
    glue: Glue, stream: Stream, shift_BD: Tensor, scale_BD: Tensor, takes_rows: bool = False
) -> tuple[Tensor, Normed]:
    """Add the pending branch: (the residual stream, its modulated norm, for a product of `takes_rows`)."""
    x_BTD, branch_BTD, bias_D, gate_BD = stream
    if branch_BTD is None:
        return x_BTD, glue.norm_for(x_BTD, shift_BD, scale_BD, takes_rows)
    assert bias_D is not None and gate_BD is not None
    return glue.add_and_norm(x_BTD, branch_BTD, bias_D, gate_BD, shift_BD, scale_BD, takes_rows)


def run(again: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs); with `again` its insides are not kept but computed again for the backward
    pass. A product at its end is not: the computation stops when its input is there."""
    if again and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


def made_again(made: Tensor, make: Callable[[], Tensor], product: Product) -> saved_tensors_hooks:
    """Within, where `product` takes `made`: it is not kept for the backward pass; `make` gives its bits again there.

    Unlike a checkpoint this repeats only `make`: the norm of a sum that is kept, not the sum and what it came from. The
    weight is looked up when it is needed, as without hooks: under ZeRO 3 its memory comes and goes.
    """
    sources = [(made, make), (product.weight, product.weight.detach)]
    known = [(_identity(tensor), source) for tensor, source in sources]
    del sources, made  # or the hooks would keep it

    def pack(tensor: Tensor) -> Any:
        for identity, source in known:
            if _identity(tensor) == identity:
                return source, tensor.shape, tensor.stride()
        return tensor

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        source, shape, stride = kept
        return source().as_strided(shape, stride)

    return saved_tensors_hooks(pack, unpack)


def _identity(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


class Attention(nn.Module):
    """Self-attention over all tokens; q, k and v stay where the one product of `qkv` wrote them."""

    def __init__(self, hidden_size: int, num_heads: int, backend: str, bias_later: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Product(hidden_size, 3 * hidden_size, bias_later=False)
        self.proj = Product(hidden_size, hidden_size, bias_later)
        self.attend = implementation(backend)

    def forward(self, qkv_BTX: Tensor) -> Tensor:
        """The output of `qkv` -> the branch [B, T, D]."""
        qkv_BT3NK = qkv_BTX.unflatten(-1, (3, self.num_heads, -1))
        return self.proj(self.attend(qkv_BT3NK).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, width: int, glue: Glue) -> None:
        super().__init__()
        self.fc1 = Product(hidden_size, width, bias_later=glue.fused)
        self.fc2 = Product(width, hidden_size, bias_later=glue.fused)
        self.glue = glue

    def forward(self, hidden_BTX: Tensor) -> Tensor:
        """The output of `fc1` -> the branch [B, T, D]."""
        return self.fc2(self.glue.gelu(hidden_BTX, self.fc1.bias))

    def sparing(self, hidden_BTX: Tensor) -> Tensor:
        """`forward`, whose GELU is made again for the backward pass."""
        made = self.glue.gelu(hidden_BTX, self.fc1.bias)
        inputs = (hidden_BTX.detach(), self.fc1.bias.detach())
        with made_again(made, functools.partial(self.glue.gelu, *inputs), self.fc2):
            return self.fc2(made)


def modulation(hidden_size: int, num_outputs: int) -> nn.Sequential:
    """Conditioning [B, D] -> shifts, scales, gates. Number 0 is a SiLU in the checkpoints' naming;
    it would see the same vector in every block, so DiT.forward applies it once for all."""
    return nn.Sequential(nn.Identity(), nn.Linear(hidden_size, num_outputs * hidden_size))


class Block(nn.Module):
    """A transformer block with adaLN-Zero: attention, then MLP, each normed, modulated, gated."""

    SCALES = (6, (1, 4))  # parts of modulation_BX, and which are scales

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_width: int,
        attention: str,
        glue: Glue,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, attention, bias_later=glue.fused)
        self.mlp = Mlp(hidden_size, mlp_width, glue)
        self.adaLN_modulation = modulation(hidden_size, 6)
        self.glue, self.recompute = glue, recompute

    def forward(self, stream: Stream, modulation_BX: Tensor, *places: Tensor | None) -> Stream:
        """modulation_BX [B, 6 D]: what `adaLN_modulation` gives: shift, scale and gate, twice. places: for `attn`."""
        whole = self.recompute == "full"
        return Stream(*run(whole, self._forward, modulation_BX, places, *stream))

    def _forward(
        self, modulation_BX: Tensor, places: tuple[Tensor | None, ...], *stream: Any
    ) -> Stream:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation_BX.chunk(6, 1)
        whole, enter, leave = self._ways()
        x, qkv = run(whole, enter, self.attn.qkv, shift_a, scale_a, *stream)
        pending = (x, self.attn(qkv, *places), self.attn.proj.bias, gate_a)
        x, hidden = run(whole, enter, self.mlp.fc1, shift_m, scale_m, *pending)
        return Stream(x, run(whole, leave, hidden), self.mlp.fc2.bias, gate_m)

    def _ways(self) -> tuple[bool, Callable[..., Any], Callable[..., Any]]:
        """(whether `run` computes again, the way into a branch, the way out of the MLP)."""
        some = self.recompute == "selective" and torch.is_grad_enabled()
        # torch's own norm keeps more than its result, and a compiler sees no hooks.
        whole = some and not (self.glue.fused and not torch.compiler.is_compiling())
        enter = self._enter_sparing if some and not whole else self._enter
        return whole, enter, self.mlp.sparing if some and not whole else self.mlp

    def _enter(
        self, product: Product, shift: Tensor, scale: Tensor, *stream: Any
    ) -> tuple[Tensor, Tensor]:
        """Up to and with the first product of a branch."""
        x, normed = advance(self.glue, Stream(*stream), shift, scale, product.takes_rows)
        return x, product(*normed)

    def _enter_sparing(
        self, product: Product, shift: Tensor, scale: Tensor, *stream: Any
    ) -> tuple[Tensor, Tensor]:
        """`_enter`, whose norm is made again from the stream, which is kept anyhow."""
        x, normed = advance(self.glue, Stream(*stream), shift, scale, product.takes_rows)
        inputs = (x.detach(), shift.detach(), scale.detach())
        with made_again(normed.y, functools.partial(self.glue.norm, *inputs), product):
            return x, product(*normed)


class FinalLayer(nn.Module):
    """Tokens [B, T, D] -> patches [B, T, patch * patch * C']."""

    SCALES = (2, (1,))

    def __init__(self, hidden_size: int, num_outputs: int, glue: Glue) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, num_outputs)
        self.adaLN_modulation = modulation(hidden_size, 2)
        self.glue = glue

    def forward(self, stream: Stream, modulation_BX: Tensor) -> Tensor:
        """modulation_BX [B, 2 D]: shift and scale."""
        shift, scale = modulation_BX.chunk(2, 1)
        _, normed = advance(self.glue, stream, shift, scale)
        return self.linear(normed.y)
