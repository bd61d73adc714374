"""The noise op in C++ on the CPU: the calls into csrc/noise.cpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from speed_kernels import build, philox, table
from speed_kernels.cpp import DTYPE_NUMBERS, address


def unavailable() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    return build.unavailable()


@functools.cache
def library_functions(isa: str | None = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The C functions (noise, normals), for this processor's instruction set or the named one."""
    library = build.load("noise.cpp", isa)
    pointer, word, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    noise, normals = library.speed_noise, library.speed_normals
    noise.argtypes = [pointer, word, pointer, word, *[pointer] * 7, *[count] * 6]
    noise.restype = count
    normals.argtypes = [pointer, pointer, *[count] * 3]
    normals.restype = None
    return noise, normals


def noise(
    x0: Tensor,
    cdf_T: Tensor | None,
    rows_T8: Tensor,
    time_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
    row_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `speed_kernels.noise.op`. Threads: torch.get_num_threads()."""
    x0, rows_T8, time_T, address_2 = (
        tensor.contiguous() for tensor in (x0, rows_T8, time_T, address_2)
    )
    cdf_T = None if cdf_T is None else cdf_T.contiguous()
    chosen_B = None if row_B is None else row_B.contiguous()
    batch = x0.shape[0]
    x_t = torch.empty(x0.shape, dtype=dtype)
    row_B = torch.empty(batch, dtype=torch.int64)
    time_B = torch.empty(batch, dtype=torch.float32)
    bad_sample = library_functions()[0](
        x0.data_ptr(),
        DTYPE_NUMBERS[x0.dtype],
        x_t.data_ptr(),
        DTYPE_NUMBERS[dtype],
        address(cdf_T),
        address(chosen_B),
        rows_T8.data_ptr(),
        time_T.data_ptr(),
        address_2.data_ptr(),
        row_B.data_ptr(),
        time_B.data_ptr(),
        batch,
        x0.numel() // max(batch, 1),
        rows_T8.shape[0],
        seed,
        num_slots,
        philox.stratum_stride(num_slots) if stratified else 0,
    )
    if bad_sample and chosen_B is not None:
        raise table.no_such_row(chosen_B, bad_sample - 1, rows_T8.shape[0])
    return x_t, row_B, time_B


def normals(address_2: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """See `speed_kernels.noise.op`. Threads: torch.get_num_threads()."""
    address_2 = address_2.contiguous()
    out = torch.empty(shape, dtype=torch.float32)
    library_functions()[1](
        out.data_ptr(),
        address_2.data_ptr(),
        shape[0],
        out.numel() // max(shape[0], 1),
        seed,
    )
    return out
