"""The diffusion training loss and its gradient by the network's output, in one pass over the output.

For sample b with row j of the step table, N elements, prediction f, noise eps (made again from its address) and x0:

    error   = f - (C_j x0 + D_j eps)
    mse_b   = mean(error^2)
    total_b = W_j mse_b + vb_scale (W_j if weight_vb else 1) vb_b
    total   = grad_scale * sum_b total_b

With a learned variance the network gives v as well: log variance = h LOGVAR_MAX + (1 - h) LOGVAR_MIN, h = (v + 1) / 2,
and vb_b is the variational term in bits per element. In all rows but the first it is

    KL(q(x_{t-1} | x_t, x0) || p) = (y - 1 + exp(-y) (1 + g^2 exp(-LOGVAR_MIN) error^2)) / 2

with y = log variance - LOGVAR_MIN and g = MEAN_GAP_j: the true posterior mean less the model's is g * error. In row 0
it is the negative log likelihood of x0 in bins of width 2/255, with the tanh approximation of the normal distribution
function and probabilities clamped at 1e-12. The mean is frozen: vb has a gradient by v alone. The hybrid loss of
A. Nichol and P. Dhariwal, "Improved denoising diffusion probabilistic models", 2021, equations 13 to 16.

Tolerance against float64 with everything computed in float32 and sums that do not lose accuracy with N: an error is
within 2^-22 of |f| + |C x0| + |D eps|. From errors of a hundredth of that on: losses 2e-5 relative (+ 1e-6), gradients
2e-5 of the sample's largest (1e-3 for v in row 0), plus the rounding to out's dtype.

Shape legend: B samples, 3 losses (total, mse, vb), T rows of the table, 8 columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_kernels import contract, table
from speed_kernels.dispatch import DirectFunction, direct


def diffusion_loss(
    out: Tensor,
    x0: Tensor,
    row_B: Tensor,
    rows_T8: Tensor,
    address_2: Tensor,
    *,
    seed: int,
    learned_variance: bool = False,
    vb_scale: float = 1.0,
    weight_vb: bool = False,
    grad_scale: float | None = None,
    unit_upstream: bool = False,
    ticket: Tensor | None = None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch. Returns (total float32 scalar, losses_3B float32 [3, B]: total, mse, vb in bits).

    out         [B, C, ...], or [B, 2C, ...] with a learned variance; float32, bfloat16 or float16
    x0          [B, C, ...], what `noise` was given, with the same seed and address
    row_B       int64 [B], the rows that `noise` drew
    rows_T8     float32 [T, 8]; address_2 int64 [2]: (step, global slot of x0[0])
    vb_scale    factor of the variational term; weight_vb: whether the row's weight applies to it as well
    grad_scale  factor of the sum over samples; default 1 / B, the batch's mean. With float16 put the loss scale here:
                the gradient is rounded to out's dtype as soon as it is computed
    unit_upstream  promise that `backward()` is called on the total itself, whose upstream gradient is 1; saves a pass
                over the gradient
    ticket      int32 [1] zero on out's device, left zero: memory for the Triton kernel's programs to count themselves.
                Kept by the caller it saves a launch; one for each CUDA stream that runs this op. Default: a new one
    backend     triton, cpp or reference (`speed_kernels.contract.choose`)

    Differentiable once, by `out` through `total` alone. Raises ValueError on wrong arguments.
    """
    scale = 1.0 / max(out.shape[0], 1) if grad_scale is None else grad_scale
    args = (
        out,
        x0,
        row_B,
        rows_T8,
        address_2,
        seed,
        learned_variance,
        float(vb_scale),
        weight_vb,
        float(scale),
        backend,
        unit_upstream,
        ticket,
    )
    if direct(out):
        results: Any = _Loss.apply(out, args)
        return results
    total, losses_3B, _ = loss_op(*args)
    return total, losses_3B


class _Loss(DirectFunction):
    """`loss_op` without torch's dispatcher, which looks at every argument: all but `out` come as one."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:  # pyright: ignore
        *arguments, backend, unit_upstream, ticket = inputs
        out, x0, row_B, rows_T8, address_2, seed, learned_variance, *_ = arguments
        _check(out, x0, row_B, rows_T8, address_2, seed, learned_variance, ticket, backend)
        module = contract.implementation("loss", backend)
        total, losses_3B, grad_out = module.loss(*arguments, ticket)
        ctx.mark_non_differentiable(losses_3B)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_out)
        ctx.unit_upstream = unit_upstream
        return total, losses_3B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore
        seen = upstream if upstream is not None and upstream.device.type == "cpu" else None
        if seen is not None and not ctx.unit_upstream and float(seen) == 1:
            return ctx.saved_tensors[0], None  # looked at without waiting: it spares a pass
        return _backward(ctx, upstream)[:2]


@torch.library.custom_op("speed_kernels::loss", mutates_args=())
def loss_op(
    out: Tensor,
    x0: Tensor,
    row_B: Tensor,
    rows_T8: Tensor,
    address_2: Tensor,
    seed: int,
    learned_variance: bool,
    vb_scale: float,
    weight_vb: bool,
    grad_scale: float,
    backend: str,
    unit_upstream: bool = False,
    ticket: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, losses_3B, gradient of total by out); see `diffusion_loss`."""
    _check(out, x0, row_B, rows_T8, address_2, seed, learned_variance, ticket, backend)
    module = contract.implementation("loss", backend)
    return module.loss(
        out,
        x0,
        row_B,
        rows_T8,
        address_2,
        seed,
        learned_variance,
        vb_scale,
        weight_vb,
        grad_scale,
        ticket,
    )


@loss_op.register_fake
def _(
    out: Tensor,
    x0: Tensor,
    row_B: Tensor,
    rows_T8: Tensor,
    address_2: Tensor,
    seed: int,
    learned_variance: bool,
    vb_scale: float,
    weight_vb: bool,
    grad_scale: float,
    backend: str,
    unit_upstream: bool = False,
    ticket: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(out, x0, row_B, rows_T8, address_2, seed, learned_variance, ticket, backend)
    return (
        out.new_empty((), dtype=torch.float32),
        out.new_empty((3, out.shape[0]), dtype=torch.float32),
        out.new_empty(out.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, losses_3B, grad_out = output
    ctx.mark_non_differentiable(losses_3B, grad_out)
    # Otherwise autograd fills zeros for both, one of them as large as the network's output.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_out)
    ctx.unit_upstream = inputs[11]


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 13
    (grad_out,) = ctx.saved_tensors
    return (grad_out if ctx.unit_upstream else grad_out * upstream, *[None] * 12)


loss_op.register_autograd(_backward, setup_context=_setup_context)


def _check(
    out: Tensor,
    x0: Tensor,
    row_B: Tensor,
    rows_T8: Tensor,
    address_2: Tensor,
    seed: int,
    learned_variance: bool,
    ticket: Tensor | None,
    backend: str,
) -> None:
    table.check_table(rows_T8, address_2, x0, seed, backend)
    contract.check_dtype("out", out.dtype, backend)
    if learned_variance and x0.dim() < 2:
        raise ValueError(
            "a learned variance needs a channel dimension; give x0 the shape [B, C, ...]"
        )
    expected = list(x0.shape)
    if learned_variance:
        expected[1] *= 2
    if list(out.shape) != expected:
        raise ValueError(
            f"out has the shape {tuple(out.shape)} but x0 {tuple(x0.shape)} and learned_variance={learned_variance} "
            f"ask for {tuple(expected)}; correct the network's output channels"
        )
    table.check_rows(row_B, x0)
    if ticket is not None and (
        ticket.shape != (1,) or ticket.dtype != torch.int32 or ticket.device != x0.device
    ):
        raise ValueError(
            f"ticket is {ticket.dtype} {tuple(ticket.shape)} on {ticket.device}; it must be a zero int32 [1] on "
            f"{x0.device}, or None"
        )
    if out.device != x0.device:
        raise ValueError(f"out is on {out.device} but x0 on {x0.device}; move it there")


def sample_inputs(
    device: torch.device | str = "cpu", backend: str = "reference"
) -> Iterator[tuple[Any, ...]]:
    """Small argument tuples of the op that cover shapes, dtypes and options; for opcheck and for tests."""
    generator = torch.Generator().manual_seed(1)
    for index, (x0, _, rows_T8, _, address_2, seed, *_) in enumerate(table.samples()):
        learned = x0.dim() > 1 and index % 3 != 2
        shape = list(x0.shape)
        if learned:
            shape[1] *= 2
        out = torch.randn(shape, generator=generator).to((torch.float32, x0.dtype)[index % 2])
        row_B = torch.randint(0, rows_T8.shape[0], (x0.shape[0],), generator=generator)
        row_B[:1] = 0  # the likelihood
        rows_T8 = rows_T8.clone()
        rows_T8[:, table.LOGVAR_MIN] -= 8.0
        rows_T8[:, table.LOGVAR_MAX] -= 7.0
        rows_T8[:, table.MEAN_GAP] *= 0.02
        tensors = (out, x0, row_B, rows_T8, address_2)
        yield (
            *(tensor.to(device) for tensor in tensors),
            seed,
            learned,
            0.5,
            index % 2 == 0,
            1.0 / 32,
            backend,
        )
