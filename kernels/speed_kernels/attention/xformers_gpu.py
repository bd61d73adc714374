"""Attention by xformers' memory_efficient_attention.

The only file that imports xformers, and only when it is asked for. It takes multiples of 8 as the size of a head; below
it are the kernels of torch (FlashAttention 2 or CUTLASS), with their padding.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

from speed_kernels.attention.interface import Backend, Case, no_gpu


def unavailable() -> str | None:
    """Why xformers cannot be used here, or None."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed; pip install 'speed-engine[xformers]'"
    if why_not := no_gpu("xformers"):
        return why_not
    try:
        import xformers.ops  # pyright: ignore[reportMissingImports] # noqa: F401
    except (ImportError, OSError) as error:  # built for another torch, or a library is missing
        return f"xformers is installed but cannot be imported: {error}"
    return None


def unsupported(case: Case) -> str | None:
    """Why it does not take the case, or None."""
    if case.device.type != "cuda":
        return f"xformers runs on CUDA devices, not on {case.device.type}"
    if case.head_dim % 8 != 0:
        return f"xformers needs a head size that is a multiple of 8, not {case.head_dim}"
    return None


def attend(qkv_BT3NK: Tensor) -> Tensor:
    """[B, T, 3, N, K] -> [B, T, N, K]; xformers takes strided q, k, v in this order of axes."""
    from xformers.ops import (  # pyright: ignore[reportMissingImports]
        memory_efficient_attention,
    )

    q_BTNK, k_BTNK, v_BTNK = qkv_BT3NK.unbind(2)
    return memory_efficient_attention(q_BTNK, k_BTNK, v_BTNK)


XFORMERS = Backend(attend, unavailable, unsupported)
