"""Attention over all tokens, without a mask: softmax(q k^T / sqrt(K)) v for every head.

There is no kernel of ours behind it: this file chooses between torch's and xformers'
implementations, once, when a model is built, and says why. Both take q, k and v as they lie in the
output of one matrix product, without a copy: one tensor [B, T, 3, N, K] -> [B, T, N, K].
"""

# Shape suffixes: B samples, T tokens, 3 = (q, k, v), N heads, K size of a head.

from __future__ import annotations

from collections.abc import Callable

import torch
from speed_kernels.attention import sdpa, xformers_gpu
from speed_kernels.contract import BackendError, Choice
from torch import Tensor

MODULES = {"sdpa": sdpa, "xformers": xformers_gpu}


def reference(qkv_BT3NK: Tensor) -> Tensor:
    """The definition, in the dtype of its input: [B, T, 3, N, K] -> [B, T, N, K]."""
    q_BTNK, k_BTNK, v_BTNK = qkv_BT3NK.unbind(2)
    score_BNTS = torch.einsum("btnk,bsnk->bnts", q_BTNK, k_BTNK) * q_BTNK.shape[-1] ** -0.5
    return torch.einsum("bnts,bsnk->btnk", score_BNTS.softmax(-1), v_BTNK)


def implementation(backend: str) -> Callable[[Tensor], Tensor]:
    """The function [B, T, 3, N, K] -> [B, T, N, K] of a backend (`sdpa`, `xformers`)."""
    if backend not in MODULES:
        raise BackendError(f"attention has no backend {backend!r}; it has: {', '.join(MODULES)}")
    return MODULES[backend].attend


def choose_attention(
    device: torch.device | str, requested: str = "auto", *, head_dim: int
) -> Choice:
    """Decide which implementation runs on `device` for heads of `head_dim` elements.

    `auto` is torch's own on every device: without a mask it has the same kernels as xformers.
    Raises BackendError where the implementation asked for cannot run.
    """
    device = torch.device(device)
    if requested == "auto":
        return Choice("attention", "sdpa", f"torch's fused attention on {device.type}", False)
    if requested not in MODULES:
        raise BackendError(f"attention has no backend {requested!r}; it has: {', '.join(MODULES)}")
    why_not = MODULES[requested].unavailable() or MODULES[requested].unsupported(device, head_dim)
    if why_not is not None:
        raise BackendError(f"model.attention={requested} cannot run: {why_not}")
    return Choice("attention", requested, "asked for", False)
