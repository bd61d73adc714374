"""The forward process of diffusion as one op: draw a row of the step table, make the noise, write the noised sample.
The same at rows that somebody else chose, and the noise alone.

For sample b at global slot s = address[1] + b and step = address[0]:

    row_b = number of entries of cdf_T that are <= U(seed, step, s)          (integers only: equal on every backend)
    x_t   = A[row_b] * x0 + B[row_b] * eps(seed, step, s, element)           eps ~ N(0, 1), never stored
    time_b = time_T[row_b]                                                     what the network is told

`noise_at` is given row_b, `normals` gives eps. All randomness is addressed (`speed_kernels.philox`), so the result does
not depend on how the global batch is cut into micro-batches and ranks. J. Ho et al., "Denoising diffusion probabilistic
models", 2020, equation 4, in table form.

Tolerance: rows and time are equal on all backends; x_t in float32 is within 4 units in the last place of
|A x0| + |B eps| of the reference, and otherwise rounded once to `dtype`; normals are within 5 units in their own last
place. Everything is computed in float32.

Shape legend: B samples, T rows of the table, 8 columns (A, B, C, D, W, LOGVAR_MIN, LOGVAR_MAX, MEAN_GAP).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from speed_kernels import contract, table
from speed_kernels.dispatch import direct


def noise(
    x0: Tensor,
    cdf_T: Tensor,
    rows_T8: Tensor,
    time_T: Tensor,
    address_2: Tensor,
    *,
    seed: int,
    num_slots: int,
    stratified: bool = True,
    dtype: torch.dtype | None = None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise a batch. Returns (x_t like x0 in `dtype`, row_B int64 [B], time_B float32 [B]).

    x0         [B, ...] float32, bfloat16 or float16 (float64 on the reference); any strides
    cdf_T      int64 [T], cumulative density times 2**32, last entry 2**32
    rows_T8    float32 [T, 8]; time_T float32 [T]
    address_2  int64 [2] on x0's device: (step, global slot of x0[0])
    seed       in [0, 2**63)
    num_slots  size of the global batch, in [1, 2**31)
    stratified whether the global batch's draws are spread over equal parts of the density
    dtype      of x_t; default: x0's
    backend    triton, cpp or reference (`speed_kernels.contract.choose`)

    Differentiable by x0: the gradient is A[row_B] times the upstream gradient. Raises ValueError on wrong arguments.
    """
    out_dtype = x0.dtype if dtype is None else dtype
    noise_or_op = _noise if direct(x0) and not x0.requires_grad else noise_op
    return noise_or_op(
        x0, cdf_T, rows_T8, time_T, address_2, seed, num_slots, stratified, out_dtype, backend
    )


def noise_at(
    x0: Tensor,
    row_B: Tensor,
    rows_T8: Tensor,
    time_T: Tensor,
    address_2: Tensor,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `noise`, at the given rows (int64 [B], in 0 .. T - 1): the same noise at the same address, and nothing drawn.

    Returns (x_t, the rows, time_B). A row outside the table raises ValueError in C++ and IndexError in the reference;
    on a GPU, which cannot be asked without waiting, its sample and time are not numbers.
    """
    out_dtype = x0.dtype if dtype is None else dtype
    return noise_op(x0, None, rows_T8, time_T, address_2, seed, 1, False, out_dtype, backend, row_B)


def normals(address_2: Tensor, shape: Sequence[int], *, seed: int, backend: str) -> Tensor:
    """The noise itself: standard normals, float32 of `shape` ([B, ...]) on the address's device.

    address_2  int64 [2]: (step, global slot of the first sample); seed in [0, 2**63)
    backend    triton, cpp or reference (`speed_kernels.contract.choose`)

    What `noise` adds to a batch of this shape at this address. Raises ValueError on wrong arguments.
    """
    return normals_op(address_2, shape, seed, backend)


def _noise(
    x0: Tensor,
    cdf_T: Tensor | None,
    rows_T8: Tensor,
    time_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
    backend: str,
    row_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `noise` (with cdf_T) and `noise_at` (with row_B)."""
    _check(x0, cdf_T, rows_T8, time_T, address_2, seed, num_slots, dtype, backend, row_B)
    module = contract.implementation("noise", backend)
    return module.noise(
        x0, cdf_T, rows_T8, time_T, address_2, seed, num_slots, stratified, dtype, row_B
    )


noise_op = torch.library.custom_op("speed_kernels::noise", _noise, mutates_args=())


@noise_op.register_fake
def _(
    x0: Tensor,
    cdf_T: Tensor | None,
    rows_T8: Tensor,
    time_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
    backend: str,
    row_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x0, cdf_T, rows_T8, time_T, address_2, seed, num_slots, dtype, backend, row_B)
    batch = x0.shape[0]
    return (
        x0.new_empty(x0.shape, dtype=dtype),
        x0.new_empty(batch, dtype=torch.int64),
        x0.new_empty(batch, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, row_B, time_B = output
    ctx.mark_non_differentiable(row_B, time_B)
    ctx.set_materialize_grads(False)  # no zeros for those two
    ctx.save_for_backward(inputs[2], row_B)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    rows_T8, row_B = ctx.saved_tensors
    a_B = rows_T8[:, table.A].index_select(0, row_B).view(-1, *[1] * (grad.dim() - 1))
    return ((grad * a_B).to(ctx.dtype), *[None] * 10)


noise_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("speed_kernels::normals", mutates_args=())
def normals_op(address_2: Tensor, shape: Sequence[int], seed: int, backend: str) -> Tensor:
    """See `normals`."""
    _check_normals(address_2, shape, seed)
    return contract.implementation("noise", backend).normals(address_2, shape, seed)


@normals_op.register_fake
def _(address_2: Tensor, shape: Sequence[int], seed: int, backend: str) -> Tensor:
    _check_normals(address_2, shape, seed)
    return address_2.new_empty(shape, dtype=torch.float32)


def _check(
    x0: Tensor,
    cdf_T: Tensor | None,
    rows_T8: Tensor,
    time_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    dtype: torch.dtype,
    backend: str,
    row_B: Tensor | None,
) -> None:
    table.check_table(rows_T8, address_2, x0, seed, backend)
    num_rows = rows_T8.shape[0]
    columns = [("time_T", time_T, torch.float32)]
    if row_B is not None:
        table.check_rows(row_B, x0)
    elif cdf_T is not None:
        columns.append(("cdf_T", cdf_T, torch.int64))
    else:
        raise ValueError("rows are neither drawn nor given; pass cdf_T or row_B")
    for name, tensor, expected in columns:
        if tensor.shape != (num_rows,) or tensor.dtype != expected or tensor.device != x0.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; "
                f"it must be {expected} [{num_rows}] on {x0.device}, like the table's rows"
            )
    if not 1 <= num_slots < 2**31:
        raise ValueError(
            f"num_slots={num_slots} is outside 1 .. 2**31 - 1; give the size of the global batch"
        )
    if not contract.takes(dtype, backend):
        raise ValueError(
            f"dtype={dtype} cannot be written by the {backend} backend; choose float32, bfloat16 or float16"
        )


def _check_normals(address_2: Tensor, shape: Sequence[int], seed: int) -> None:
    table.check_address(address_2, seed)
    if len(shape) < 1 or min(shape) < 0:
        raise ValueError(
            f"shape={tuple(shape)} is no batch; give it as [batch, ...], 0 or more each"
        )


def sample_inputs(
    device: torch.device | str = "cpu", backend: str = "reference"
) -> Iterator[tuple[Any, ...]]:
    """Small argument tuples of the op that cover shapes, dtypes and options; for opcheck and for tests."""
    for args in table.samples():
        moved = (arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)
        yield (*moved, backend)
    for x0, _, rows_T8, time_T, address_2, seed, _, _, dtype in table.samples():
        row_B = torch.arange(x0.shape[0]) * 5 % rows_T8.shape[0]
        tensors = [tensor.to(device) for tensor in (x0, rows_T8, time_T, address_2)]
        yield tensors[0], None, *tensors[1:], seed, 1, False, dtype, backend, row_B.to(device)
