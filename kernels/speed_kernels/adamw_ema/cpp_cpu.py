"""AdamW + EMA on the CPU: the call into csrc/adamw_ema.cpp, one pass over all tensors, on torch's threads.

Only addresses and sizes cross the border; results do not depend on the number of threads or on how the elements are cut
into tensors.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from speed_kernels import build
from speed_kernels.adamw_ema import layout
from speed_kernels.cpp import DTYPE_NUMBERS, address


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    return build.unavailable()


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load("adamw_ema.cpp")
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.adamw_ema_update.argtypes = [int64, pointer, pointer, pointer, int32, int32, int32]
    library.adamw_ema_update.restype = None
    library.adamw_ema_squares.argtypes = [int64, pointer, pointer, int32]
    library.adamw_ema_squares.restype = ctypes.c_double
    library.adamw_ema_prepare.argtypes = [pointer] * 6
    library.adamw_ema_prepare.restype = None
    return library


def _grad_type(grads: Sequence[Tensor]) -> int:
    if grads[0].dtype not in DTYPE_NUMBERS:
        raise ValueError(
            f"the C++ kernel takes no {grads[0].dtype} gradient; use backend reference"
        )
    return DTYPE_NUMBERS[grads[0].dtype]


def grad_square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares in double precision, rounded to float32 []."""
    kind = _grad_type(grads)
    sizes = array("q", [grad.numel() for grad in grads])
    table = array("q", [grad.data_ptr() for grad in grads])
    total = _library().adamw_ema_squares(
        len(grads), sizes.buffer_info()[0], table.buffer_info()[0], kind
    )
    return torch.tensor(total, dtype=torch.float64).to(torch.float32)


def prepare(
    step: Tensor,
    skipped: Tensor | None,
    hyper: Tensor,
    square_sum: Tensor | None,
    grad_scale: Tensor | None,
) -> Tensor:
    """The scalars of one step; see op.prepare."""
    scalars = torch.empty(layout.SCALARS_SIZE)
    hyper = hyper.contiguous()
    _library().adamw_ema_prepare(
        step.data_ptr(),
        address(skipped),
        hyper.data_ptr(),
        address(square_sum),
        address(grad_scale),
        scalars.data_ptr(),
    )
    return scalars


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    emas: Sequence[Tensor],
    second_emas: Sequence[Tensor],
    copies: Sequence[Tensor],
    scalars: Tensor,
) -> None:
    """One step in place; see op.adamw_ema."""
    kind = _grad_type(grads)
    nothing = [0] * len(params)
    sizes = array("q", [param.numel() for param in params])
    table = array("q", [tensor.data_ptr() for tensor in (*params, *grads, *exp_avgs, *exp_avg_sqs)])
    table.extend([tensor.data_ptr() for tensor in emas])
    table.extend([tensor.data_ptr() for tensor in second_emas] or nothing)
    table.extend([tensor.data_ptr() for tensor in copies] or nothing)
    scalars = scalars.contiguous()
    _library().adamw_ema_update(
        len(params),
        sizes.buffer_info()[0],
        table.buffer_info()[0],
        scalars.data_ptr(),
        kind,
        int(bool(second_emas)),
        int(bool(copies)),
    )
