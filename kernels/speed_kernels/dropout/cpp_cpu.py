"""Addressed dropout in C++ on the CPU: the call into csrc/dropout.cpp."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from speed_kernels import build
from speed_kernels.cpp import DTYPE_NUMBERS
from speed_kernels.dropout.op import threshold


def unavailable() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    return build.unavailable()


@functools.cache
def library_function(isa: str | None = None) -> Any:
    """The C function, for this processor's instruction set or the named one."""
    function = build.load("dropout.cpp", isa).speed_dropout
    pointer, word, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    function.argtypes = [
        *[pointer] * 2,
        word,
        pointer,
        *[count] * 3,
        ctypes.c_uint32,
        ctypes.c_float,
    ]
    function.restype = None
    return function


def dropout(x_BCHW: Tensor, address_3: Tensor, layer: int, p: float) -> Tensor:
    """See `speed_kernels.dropout.op`; x is in channels-last memory and not empty. Threads: torch.get_num_threads()."""
    address_3 = address_3.contiguous()
    y_BCHW = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    library_function()(
        x_BCHW.data_ptr(),
        y_BCHW.data_ptr(),
        DTYPE_NUMBERS[x_BCHW.dtype],
        address_3.data_ptr(),
        x_BCHW.shape[0],
        x_BCHW[0].numel(),
        layer,
        threshold(p),
        1.0 / (1.0 - p),
    )
    return y_BCHW
