"""The noise op in C++ on the CPU: the call into csrc/noise.cpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speed_kernels import build, philox
from speed_kernels.cpp import DTYPE_NUMBERS


def unavailable() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    return build.unavailable()


@functools.cache
def library_function(isa: str | None = None) -> Callable[..., Any]:
    """The C function, for this processor's instruction set or the named one (AVX512, AVX2, DEFAULT)."""
    function = build.load("noise.cpp", isa).speed_noise
    pointer, word, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    function.argtypes = [pointer, word, pointer, word, *[pointer] * 6, *[count] * 6]
    function.restype = None
    return function


def noise(
    x0: Tensor,
    cdf_T: Tensor,
    rows_T8: Tensor,
    tau_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.noise.op`. Threads: torch.get_num_threads()."""
    x0, cdf_T, rows_T8, tau_T, address_2 = (
        tensor.contiguous() for tensor in (x0, cdf_T, rows_T8, tau_T, address_2)
    )
    batch = x0.shape[0]
    x_t = torch.empty(x0.shape, dtype=dtype)
    row_B = torch.empty(batch, dtype=torch.int64)
    tau_B = torch.empty(batch, dtype=torch.float32)
    library_function()(
        x0.data_ptr(),
        DTYPE_NUMBERS[x0.dtype],
        x_t.data_ptr(),
        DTYPE_NUMBERS[dtype],
        cdf_T.data_ptr(),
        rows_T8.data_ptr(),
        tau_T.data_ptr(),
        address_2.data_ptr(),
        row_B.data_ptr(),
        tau_B.data_ptr(),
        batch,
        x0.numel() // max(batch, 1),
        rows_T8.shape[0],
        seed,
        num_slots,
        philox.stratum_stride(num_slots) if stratified else 0,
    )
    return x_t, row_B, tau_B
