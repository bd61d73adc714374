"""Attention by torch's scaled_dot_product_attention.

It picks cuDNN, flash, memory-efficient or plain attention by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable() -> str | None:
    """It is part of torch."""
    return None


def unsupported(device: torch.device, head_dim: int) -> str | None:
    """It runs on every device with every head size."""
    return None


def attend(qkv_BT3NK: Tensor) -> Tensor:
    """[B, T, 3, N, K] -> [B, T, N, K]; the transpositions are views on both sides."""
    q_BNTK, k_BNTK, v_BNTK = qkv_BT3NK.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK).transpose(1, 2)
