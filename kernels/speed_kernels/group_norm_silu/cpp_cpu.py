"""Group normalisation with SiLU in C++ on the CPU: the calls into csrc/group_norm_silu.cpp."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from speed_kernels import build
from speed_kernels.cpp import DTYPE_NUMBERS


def unavailable() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    return build.unavailable()


@functools.cache
def library_functions(isa: str | None = None) -> tuple[Any, Any]:
    """The C functions (forward, backward), for this processor's instruction set or the named one."""
    library = build.load("group_norm_silu.cpp", isa)
    pointer, word, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    forward, backward = library.speed_group_norm_silu, library.speed_group_norm_silu_backward
    typed = [pointer, word]
    forward.argtypes = [*typed * 3, *[pointer] * 2, *[count] * 4, ctypes.c_double, word]
    backward.argtypes = [pointer, *typed * 3, *[pointer] * 4, *[count] * 4, word]
    forward.restype = backward.restype = None
    return forward, backward


def _typed(*tensors: Tensor) -> list[int]:
    """Address and dtype of each."""
    return [word for t in tensors for word in (t.data_ptr(), DTYPE_NUMBERS[t.dtype])]


def _sizes(x_BCHW: Tensor) -> tuple[int, int, int]:
    """Samples, pixels, channels."""
    return x_BCHW.shape[0], x_BCHW.shape[2] * x_BCHW.shape[3], x_BCHW.shape[1]


def group_norm_silu(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """See `speed_kernels.group_norm_silu.op`; x is in channels-last memory and not empty.

    Threads: torch.get_num_threads(); the result does not depend on their number.
    """
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    y = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    statistics_B2C = torch.empty(x_BCHW.shape[0], 2, x_BCHW.shape[1], dtype=torch.float32)
    library_functions()[0](
        *_typed(x_BCHW, weight_C, bias_C),
        statistics_B2C.data_ptr(),
        y.data_ptr(),
        *_sizes(x_BCHW),
        num_groups,
        eps,
        silu,
    )
    return y, statistics_B2C


def group_norm_silu_backward(
    d_y_BCHW: Tensor,
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_B2C: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, d_weight, d_bias); d_y and x are in channels-last memory and not empty."""
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    d_x = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    d_weight_C, d_bias_C = torch.empty_like(weight_C), torch.empty_like(bias_C)
    library_functions()[1](
        d_y_BCHW.data_ptr(),
        *_typed(x_BCHW, weight_C, bias_C),
        *(t.data_ptr() for t in (statistics_B2C, d_x, d_weight_C, d_bias_C)),
        *_sizes(x_BCHW),
        num_groups,
        silu,
    )
    return d_x, d_weight_C, d_bias_C
