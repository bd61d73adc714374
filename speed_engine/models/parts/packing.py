"""Tokens that a pass leaves out: which ones, by address, and the stream without them.

What stays is packed, so that the blocks in between compute less; which tokens stay differs from sample to sample and is
a function of (seed, step, global slot) alone.
"""

# Shape suffixes: B samples, T tokens, K of them kept, D hidden size, 3 = (seed, step, first slot).

from __future__ import annotations

from collections.abc import Callable

import torch
from speed_kernels import philox
from torch import Tensor

from speed_engine.models.parts.blocks import Stream
from speed_engine.models.parts.glue import Glue, gated_add


def address_of(seed: int, address_2: Tensor) -> Tensor:
    """int64 [3] on the device of address_2, which is (step, first global slot) of a batch."""
    return torch.cat([torch.full_like(address_2[:1], seed), address_2])


def kept(at_3: Tensor, batch: int, tokens: int, num_kept: int) -> Tensor:
    """The places that stay, ascending: int64 [B, K]."""
    seed, step, slot = at_3.unbind()
    shape, device = (batch, -(-tokens // 4)), at_3.device
    counter = (
        torch.arange(shape[1], device=device).expand(shape),
        (slot + torch.arange(batch, device=device))[:, None].expand(shape),
        step.expand(shape),
        torch.full(shape, philox.STREAM_MASK, device=device),
    )
    bits = philox.philox4x32(torch.stack(counter, dim=-1), (seed & 0xFFFFFFFF, seed >> 32))
    # No two alike, so that the order is the same on every device.
    place_T = torch.arange(tokens, device=device)
    number_BT = bits.flatten(1)[:, :tokens] * tokens + place_T
    return number_BT.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def num_kept(tokens: int, left_out: float) -> int:
    """Tokens of a sample that stay when the share `left_out` goes; at least one."""
    return max(1, int(tokens * (1 - left_out)))


def settled(stream: Stream, glue: Glue) -> Tensor:
    """The residual stream [B, T, D] with the branch that was still to be added."""
    x_BTD, branch_BTD, bias_D, gate_BD = stream
    if branch_BTD is None:
        return x_BTD
    assert bias_D is not None and gate_BD is not None
    if glue.fused:
        branch_BTD = branch_BTD + bias_D.to(branch_BTD.dtype)
    return gated_add(x_BTD, branch_BTD, gate_BD)


def around(
    blocks: Callable[[Stream], Stream],
    stream: Stream,
    at_3: Tensor,
    left_out: float,
    glue: Glue,
) -> Stream:
    """The stream behind `blocks`, around which the share `left_out` of each sample's tokens goes unchanged."""
    x_BTD = settled(stream, glue)
    batch, tokens, width = x_BTD.shape
    index = index_of(kept(at_3, batch, tokens, num_kept(tokens, left_out)), width)
    inside = blocks(Stream(x_BTD.gather(1, index)))
    return Stream(x_BTD.scatter(1, index, settled(inside, glue)))


def index_of(kept_BK: Tensor, width: int) -> Tensor:
    """int64 [B, K, D], as `gather` and `scatter` of a stream want it."""
    return kept_BK[:, :, None].expand(-1, -1, width)


def block_macs(tokens: int, hidden: int, mlp_width: int) -> int:
    """Multiply-adds of one transformer block over `tokens` tokens, without its adaLN."""
    return tokens * hidden * (4 * hidden + 2 * mlp_width + 2 * tokens)


def spared_macs(tokens: int, left_out: float, hidden: int, mlp_width: int) -> int:
    """Multiply-adds that one block spares when the share `left_out` of its tokens goes."""
    stay = num_kept(tokens, left_out)
    return block_macs(tokens, hidden, mlp_width) - block_macs(stay, hidden, mlp_width)
