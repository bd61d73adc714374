"""The loss op in C++ on the CPU: the call into csrc/loss.cpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speed_kernels import build, table
from speed_kernels.cpp import DTYPE_NUMBERS


def unavailable() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    return build.unavailable()


@functools.cache
def library_function(isa: str | None = None) -> Callable[..., Any]:
    """The C function, for this processor's instruction set or the named one (AVX512, AVX2, DEFAULT)."""
    function = build.load("loss.cpp", isa).speed_loss
    pointer, word, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    real = ctypes.c_double
    function.argtypes = [pointer, word, pointer, word, *[pointer] * 6, *[count] * 4]
    function.argtypes += [word, real, word, real]
    function.restype = ctypes.c_int64
    return function


def loss(
    out: Tensor,
    x0: Tensor,
    row_B: Tensor,
    rows_T8: Tensor,
    address_2: Tensor,
    seed: int,
    learned_variance: bool,
    vb_scale: float,
    weight_vb: bool,
    grad_scale: float,
    ticket: Tensor | None,  # the Triton kernel's
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.loss.op`. Threads: torch.get_num_threads(); the result does not depend on their number."""
    out, x0, row_B, rows_T8, address_2 = (
        tensor.contiguous() for tensor in (out, x0, row_B, rows_T8, address_2)
    )
    batch = x0.shape[0]
    total = torch.empty((), dtype=torch.float32)
    losses_3B = torch.empty(3, batch, dtype=torch.float32)
    grad_out = torch.empty(out.shape, dtype=out.dtype)
    bad_sample = library_function()(
        out.data_ptr(),
        DTYPE_NUMBERS[out.dtype],
        x0.data_ptr(),
        DTYPE_NUMBERS[x0.dtype],
        row_B.data_ptr(),
        rows_T8.data_ptr(),
        address_2.data_ptr(),
        total.data_ptr(),
        losses_3B.data_ptr(),
        grad_out.data_ptr(),
        batch,
        x0.numel() // max(batch, 1),
        rows_T8.shape[0],
        seed,
        learned_variance,
        vb_scale,
        weight_vb,
        grad_scale,
    )
    if bad_sample:
        raise table.no_such_row(row_B, bad_sample - 1, rows_T8.shape[0])
    return total, losses_3B, grad_out
