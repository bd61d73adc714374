"""The forward process of diffusion as one op: draw a row of the step table, make the noise, write the noised sample.

For sample b at global slot s = address[1] + b and step = address[0]:

    row_b = number of entries of cdf_T that are <= U(seed, step, s)          (integers only: equal on every backend)
    x_t   = A[row_b] * x0 + B[row_b] * eps(seed, step, s, element)           eps ~ N(0, 1), never stored
    tau_b = tau_T[row_b]                                                     what the network is told

All randomness is addressed (`speed_kernels.philox`), so the result does not depend on how the global batch is cut into
micro-batches and ranks. J. Ho et al., "Denoising diffusion probabilistic models", 2020, equation 4, in table form.

Tolerance: rows and tau are equal on all backends; x_t in float32 is within 4 units in the last place of
|A x0| + |B eps| of the reference, and otherwise rounded once to `dtype`. Everything is computed in float32.

Shape legend: B samples, T rows of the table, 8 columns (A, B, C, D, W, LOGVAR_MIN, LOGVAR_MAX, MEAN_GAP).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from speed_kernels import contract, table


def noise(
    x0: Tensor,
    cdf_T: Tensor,
    rows_T8: Tensor,
    tau_T: Tensor,
    address_2: Tensor,
    *,
    seed: int,
    num_slots: int,
    stratified: bool = True,
    dtype: torch.dtype | None = None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise a batch. Returns (x_t like x0 in `dtype`, row_B int64 [B], tau_B float32 [B]).

    x0         [B, ...] float32, bfloat16 or float16 (float64 on the reference); any strides
    cdf_T      int64 [T], cumulative density times 2**32, last entry 2**32
    rows_T8    float32 [T, 8]; tau_T float32 [T]
    address_2  int64 [2] on x0's device: (step, global slot of x0[0])
    seed       in [0, 2**63)
    num_slots  size of the global batch, in [1, 2**31)
    stratified whether the global batch's draws are spread over equal parts of the density
    dtype      of x_t; default: x0's
    backend    triton, cpp or reference (`speed_kernels.contract.choose`)

    Differentiable by x0: the gradient is A[row_B] times the upstream gradient. Raises ValueError on wrong arguments.
    """
    out_dtype = x0.dtype if dtype is None else dtype
    return noise_op(
        x0, cdf_T, rows_T8, tau_T, address_2, seed, num_slots, stratified, out_dtype, backend
    )


@torch.library.custom_op("speed_kernels::noise", mutates_args=())
def noise_op(
    x0: Tensor,
    cdf_T: Tensor,
    rows_T8: Tensor,
    tau_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x0, cdf_T, rows_T8, tau_T, address_2, seed, num_slots, dtype, backend)
    module = contract.implementation("noise", backend)
    return module.noise(x0, cdf_T, rows_T8, tau_T, address_2, seed, num_slots, stratified, dtype)


@noise_op.register_fake
def _(
    x0: Tensor,
    cdf_T: Tensor,
    rows_T8: Tensor,
    tau_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    stratified: bool,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x0, cdf_T, rows_T8, tau_T, address_2, seed, num_slots, dtype, backend)
    batch = x0.shape[0]
    return (
        x0.new_empty(x0.shape, dtype=dtype),
        x0.new_empty(batch, dtype=torch.int64),
        x0.new_empty(batch, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, row_B, tau_B = output
    ctx.mark_non_differentiable(row_B, tau_B)
    ctx.set_materialize_grads(False)  # no zeros for those two
    ctx.save_for_backward(inputs[2], row_B)
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    rows_T8, row_B = ctx.saved_tensors
    a_B = rows_T8[:, 0][row_B].view(-1, *[1] * (grad.dim() - 1))
    return ((grad * a_B).to(ctx.dtype), *[None] * 9)


noise_op.register_autograd(_backward, setup_context=_setup_context)


def _check(
    x0: Tensor,
    cdf_T: Tensor,
    rows_T8: Tensor,
    tau_T: Tensor,
    address_2: Tensor,
    seed: int,
    num_slots: int,
    dtype: torch.dtype,
    backend: str,
) -> None:
    table.check_table(rows_T8, address_2, x0, seed, backend)
    num_rows = rows_T8.shape[0]
    for name, tensor, expected in (("cdf_T", cdf_T, torch.int64), ("tau_T", tau_T, torch.float32)):
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


def sample_inputs(
    device: torch.device | str = "cpu", backend: str = "reference"
) -> Iterator[tuple[Any, ...]]:
    """Small argument tuples of the op that cover shapes, dtypes and options; for opcheck and for tests."""
    for args in table.samples():
        yield (*(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args), backend)
