"""What an implementation of attention has to be: the definition, the form of a backend, the case asked for."""

# Shape suffixes: B samples, T tokens (S the tokens attended to), 3 = (q, k, v), N heads, K size of a head.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """The attention that a model will ask for: `dtype` [batch, tokens, 3, heads, head_dim] on `device`."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.tokens, 3, self.heads, self.head_dim


@dataclass(frozen=True)
class Backend:
    """One implementation.

    `attend`: [B, T, 3, N, K] -> [B, T, N, K], differentiable. `unavailable`: why this machine cannot run it, or None.
    `unsupported`: why it does not take the case, or None. `flash`: which flash kernel torch has to hold while it runs,
    "FA2" (torch's own), "FA3" or "FA4"; None where that does not matter.
    """

    attend: Callable[[Tensor], Tensor]
    unavailable: Callable[[], str | None]
    unsupported: Callable[[Case], str | None]
    flash: str | None = None


def reference(qkv_BT3NK: Tensor) -> Tensor:
    """The definition, in the dtype of its input: [B, T, 3, N, K] -> [B, T, N, K]."""
    q_BTNK, k_BTNK, v_BTNK = qkv_BT3NK.unbind(2)
    score_BNTS = torch.einsum("btnk,bsnk->bnts", q_BTNK, k_BTNK) * q_BTNK.shape[-1] ** -0.5
    return torch.einsum("bnts,bsnk->btnk", score_BNTS.softmax(-1), v_BTNK)


def no_gpu(what: str) -> str | None:
    """Why `what`, which needs a CUDA device, cannot run on this machine, or None."""
    return None if torch.cuda.is_available() else f"{what} needs a CUDA device, and there is none"


def unfit(
    case: Case,
    what: str,
    *,
    largest: int,
    majors: tuple[int, ...] | None = None,
    oldest: int = 8,
    dtypes: tuple[torch.dtype, ...] = HALF,
) -> str | None:
    """Why `what` does not take the case, or None: the demands that all kernels for CUDA devices make.

    `majors`: the compute capabilities it has code for, None for all from `oldest` on. `largest`: its largest head.
    Rows are read 16 bytes at a time.
    """
    if case.device.type != "cuda":
        return f"{what} runs on CUDA devices, not on {case.device.type}"
    major, minor = torch.cuda.get_device_capability(case.device)
    if major < oldest or (majors is not None and major not in majors):
        wanted = " or ".join(f"{m}.x" for m in majors) if majors else f"{oldest}.0 or newer"
        return f"{what} needs compute capability {wanted}, and this device has {major}.{minor}"
    if case.dtype not in dtypes:
        names = " or ".join(dtype_name(dtype) for dtype in dtypes)
        return f"{what} computes in {names}, not in {dtype_name(case.dtype)}"
    multiple = 16 // case.dtype.itemsize
    if case.head_dim % multiple != 0 or case.head_dim > largest:
        return (
            f"{what} needs a head size that is a multiple of {multiple} up to {largest},"
            f" not {case.head_dim}"
        )
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
