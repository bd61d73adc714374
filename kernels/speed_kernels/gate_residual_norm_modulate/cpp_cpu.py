"""The op in C++ on the CPU: the calls into csrc/gate_residual_norm_modulate.cpp.

Threads: torch.get_num_threads(); the results do not depend on their number.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speed_kernels import build
from speed_kernels.cpp import DTYPE_NUMBERS, address
from speed_kernels.e4m3 import Scaled


def unavailable() -> str | None:
    """Why the C++ kernels cannot be built here, or None."""
    return build.unavailable()


@functools.cache
def library_functions(isa: str | None = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The C functions (forward, backward), for this processor's instruction set or the named one."""
    library = build.load("gate_residual_norm_modulate.cpp", isa)
    pointer, word, count = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    rows = [pointer, count]  # and the stride between them
    forward = library.speed_gate_residual_norm_modulate
    forward.argtypes = [pointer, word, pointer, word, *rows, pointer, *rows, *rows, *[pointer] * 6]
    forward.argtypes += [count, count, count, ctypes.c_double]
    backward = library.speed_gate_residual_norm_modulate_backward
    backward.argtypes = [*[pointer] * 3, word, *[pointer] * 3, word, *rows, pointer, *rows]
    backward.argtypes += [*[pointer] * 6, count, count, count]
    forward.restype = backward.restype = None
    return forward, backward


def rows_of(tensor_BD: Tensor) -> Tensor:
    """The tensor, or a copy of it if the elements of a row are not neighbours."""
    return tensor_BD if tensor_BD.stride(1) == 1 else tensor_BD.contiguous()


def forward(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    rows: Scaled | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """See `reference.forward`."""
    x_BTD, shift_BD, scale_BD = x_BTD.contiguous(), rows_of(shift_BD), rows_of(scale_BD)
    branch_BTD = None if branch_BTD is None else branch_BTD.contiguous()
    gate_BD = None if gate_BD is None else rows_of(gate_BD)
    bias_D = None if bias_D is None else bias_D.contiguous()
    sum_BTD = None if branch_BTD is None else torch.empty(x_BTD.shape, dtype=x_BTD.dtype)
    y_BTD = torch.empty(x_BTD.shape, dtype=shift_BD.dtype)
    mean_BT, rstd_BT = (torch.empty(x_BTD.shape[:2], dtype=torch.float32) for _ in range(2))
    library_functions()[0](
        x_BTD.data_ptr(),
        DTYPE_NUMBERS[x_BTD.dtype],
        address(branch_BTD),
        DTYPE_NUMBERS[shift_BD.dtype],
        address(gate_BD),
        0 if gate_BD is None else gate_BD.stride(0),
        address(bias_D),
        shift_BD.data_ptr(),
        shift_BD.stride(0),
        scale_BD.data_ptr(),
        scale_BD.stride(0),
        address(sum_BTD),
        y_BTD.data_ptr(),
        mean_BT.data_ptr(),
        rstd_BT.data_ptr(),
        None if rows is None else rows.values.data_ptr(),
        None if rows is None else rows.scale.data_ptr(),
        *x_BTD.shape,
        eps,
    )
    return sum_BTD, y_BTD, mean_BT, rstd_BT


def backward(
    d_sum_BTD: Tensor | None,
    d_y_BTD: Tensor,
    sum_BTD: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
    branch_BTD: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    scale_BD: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
    """See `reference.backward`."""
    d_sum_BTD = None if d_sum_BTD is None else d_sum_BTD.contiguous()
    d_y_BTD, sum_BTD, scale_BD = d_y_BTD.contiguous(), sum_BTD.contiguous(), rows_of(scale_BD)
    mean_BT, rstd_BT = mean_BT.contiguous(), rstd_BT.contiguous()
    d_x_BTD = torch.empty(sum_BTD.shape, dtype=sum_BTD.dtype)
    d_shift_BD, d_scale_BD = (torch.empty(scale_BD.shape, dtype=scale_BD.dtype) for _ in range(2))
    d_branch_BTD = d_gate_BD = d_bias_D = None
    if branch_BTD is not None and gate_BD is not None:
        branch_BTD, gate_BD = branch_BTD.contiguous(), rows_of(gate_BD)
        d_branch_BTD = torch.empty(sum_BTD.shape, dtype=branch_BTD.dtype)
        d_gate_BD = torch.empty(gate_BD.shape, dtype=gate_BD.dtype)
    if bias_D is not None:
        bias_D = bias_D.contiguous()
        d_bias_D = torch.empty(bias_D.shape, dtype=bias_D.dtype)
    library_functions()[1](
        address(d_sum_BTD),
        d_y_BTD.data_ptr(),
        sum_BTD.data_ptr(),
        DTYPE_NUMBERS[sum_BTD.dtype],
        mean_BT.data_ptr(),
        rstd_BT.data_ptr(),
        address(branch_BTD),
        DTYPE_NUMBERS[scale_BD.dtype],
        address(gate_BD),
        0 if gate_BD is None else gate_BD.stride(0),
        address(bias_D),
        scale_BD.data_ptr(),
        scale_BD.stride(0),
        d_x_BTD.data_ptr(),
        address(d_branch_BTD),
        address(d_gate_BD),
        d_shift_BD.data_ptr(),
        d_scale_BD.data_ptr(),
        address(d_bias_D),
        *sum_BTD.shape,
    )
    return d_x_BTD, d_branch_BTD, d_gate_BD, d_shift_BD, d_scale_BD, d_bias_D
