"""AdamW + EMA in Triton for NVIDIA GPUs (A100, H100/H200, B200): one launch, for a flat buffer or a list of tensors."""

# Launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speed_kernels import launch
from speed_kernels.adamw_ema import layout
from speed_kernels.adamw_ema.triton_flat import (
    BLOCK,
    MAX_PARTIALS,
    NUM_WARPS,
    prepare_kernel,
    square_kernel,
    square_total_kernel,
    update_kernel,
)
from speed_kernels.adamw_ema.triton_list import ListSquares, ListUpdate


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    return launch.unavailable()


def grad_square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Sum of squares as float32 []: per-lane float32 sums, float64 from there on."""
    if len(grads) > 1:
        _refuse_capture(grads[0])
        return ListSquares(grads)(grads)
    (grad,) = grads
    num_partials = min(-(-grad.numel() // BLOCK), MAX_PARTIALS)
    partials_P = torch.empty(num_partials, dtype=torch.float64, device=grad.device)
    total = torch.empty((), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        if num_partials:
            square_kernel[(num_partials,)](
                grad, partials_P, grad.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
        square_total_kernel[(1,)](partials_P, total, num_partials, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return total


def prepare(
    step: Tensor,
    skipped: Tensor | None,
    hyper: Tensor,
    square_sum: Tensor | None,
    grad_scale: Tensor | None,
) -> Tensor:
    """The scalars of one step; see op.prepare."""
    scalars = hyper.new_empty(layout.SCALARS_SIZE)
    with torch.cuda.device_of(hyper):
        prepare_kernel[(1,)](
            step,
            step if skipped is None else skipped,
            hyper.contiguous(),
            step if square_sum is None else square_sum,
            step if grad_scale is None else grad_scale,
            scalars,
            SKIPPED=skipped is not None,
            SQUARE_SUM=square_sum is not None,
            GRAD_SCALE=grad_scale is not None,
            num_warps=1,
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
    fixed = (params, exp_avgs, exp_avg_sqs, emas, second_emas, copies)
    if len(params) > 1:
        _refuse_capture(params[0])
        ListUpdate(*fixed)(grads, scalars)
        return
    (param,) = params
    if param.numel() == 0:
        return
    with torch.cuda.device_of(param):
        update_kernel[(-(-param.numel() // BLOCK),)](
            param,
            grads[0],
            exp_avgs[0],
            exp_avg_sqs[0],
            emas[0],
            second_emas[0] if second_emas else param,
            copies[0] if copies else param,
            scalars,
            param.numel(),
            SECOND=bool(second_emas),
            COPY=bool(copies),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def _refuse_capture(tensor: Tensor) -> None:
    if launch.capturing(tensor.device):
        raise RuntimeError(
            "a list of tensors is found through a table that must be written after the capture; capture the step of "
            "AdamWEMA and call its refresh(), or give one flat tensor"
        )
