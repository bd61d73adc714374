"""Bias and GELU in C++ on the CPU: the calls into csrc/bias_gelu.cpp."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from speed_kernels import build
from speed_kernels.cpp import DTYPE_NUMBERS, address


def unavailable() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    return build.unavailable()


@functools.cache
def library_functions(isa: str | None = None) -> tuple[Any, Any]:
    """The C functions (forward, backward), for this processor's instruction set or the named one."""
    library = build.load("bias_gelu.cpp", isa)
    pointer, word, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    forward, backward = library.speed_bias_gelu, library.speed_bias_gelu_backward
    forward.argtypes = [*[pointer] * 3, word, count, count]
    backward.argtypes = [*[pointer] * 5, word, count, count]
    forward.restype = backward.restype = None
    return forward, backward


def bias_gelu(x: Tensor, bias_D: Tensor | None) -> Tensor:
    """See `speed_kernels.bias_gelu.op`. Threads: torch.get_num_threads()."""
    x = x.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    if x.numel() > 0:
        num_columns = x.shape[-1]
        library_functions()[0](
            x.data_ptr(),
            address(bias_D),
            y.data_ptr(),
            DTYPE_NUMBERS[x.dtype],
            x.numel() // num_columns,
            num_columns,
        )
    return y


def bias_gelu_backward(d_y: Tensor, x: Tensor, bias_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `speed_kernels.bias_gelu.reference`. The result does not depend on the number of threads."""
    d_y, x = d_y.contiguous(), x.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    d_x = torch.empty(x.shape, dtype=x.dtype)
    d_bias_D = torch.zeros(0 if bias_D is None else x.shape[-1], dtype=x.dtype)
    if x.numel() > 0:
        num_columns = x.shape[-1]
        library_functions()[1](
            d_y.data_ptr(),
            x.data_ptr(),
            address(bias_D),
            d_x.data_ptr(),
            address(None if bias_D is None else d_bias_D),
            DTYPE_NUMBERS[x.dtype],
            x.numel() // num_columns,
            num_columns,
        )
    return d_x, d_bias_D
