"""How long an implementation of attention takes on this GPU, and that it is attention. Nothing is chosen here."""

# Shape suffixes: B samples, T tokens, 3 = (q, k, v), N heads, K size of a head.

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from speed_kernels.attention.interface import Case, reference

WARM_UP, REPEATS = 5, 10
# Work before each run, so that the host is ahead of the GPU when the clock starts and what is timed is the kernels; it
# also leaves caches and clocks as the products of a training step leave them.
FILLER_SIZE, FILLER_PRODUCTS = 4096, 4
# Error of a token relative to the mean token. Rounding to bfloat16 makes 0.01 to 0.03 with 256 tokens, growing with the
# root of their number; a token that is wrong makes about 1.
ALLOWED = 0.2


def drawn(case: Case) -> tuple[Tensor, Tensor]:
    """Normal q, k, v [B, T, 3, N, K] that want a gradient, and a gradient for the output [B, T, N, K].

    The default generators are left alone.
    """
    generator = torch.Generator(case.device).manual_seed(0)
    batch, tokens, _, heads, head_dim = case.shape
    options = {"generator": generator, "device": case.device, "dtype": case.dtype}
    qkv_BT3NK = torch.randn(case.shape, **options)
    return qkv_BT3NK.requires_grad_(), torch.randn(batch, tokens, heads, head_dim, **options)


def deviation(
    attend: Callable[[Tensor], Tensor], qkv_BT3NK: Tensor, upstream_BTNK: Tensor
) -> float:
    """The largest error of a token, in the output or the gradient, relative to the mean token; NaN for NaN.

    Computed at full size, as it will be timed, and compared in the last head of the last sample, in fp32.
    """
    out_BTNK = attend(qkv_BT3NK)
    (grad_BT3NK,) = torch.autograd.grad(out_BTNK, qkv_BT3NK, upstream_BTNK)
    last = qkv_BT3NK.detach()[-1:, :, :, -1:].float().requires_grad_()
    wanted = reference(last)
    (wanted_grad,) = torch.autograd.grad(wanted, last, upstream_BTNK[-1:, :, -1:].float())
    errors = (
        _worst_token(out_BTNK[-1:, :, -1:], wanted),
        _worst_token(grad_BT3NK[-1:, :, :, -1:], wanted_grad),
    )
    return torch.stack(errors).max().item()  # `max` of a tensor passes a NaN on


def _worst_token(found: Tensor, wanted: Tensor) -> Tensor:
    # One scale for q, k and v: with a single token the gradients of q and k are zero.
    scale = wanted.norm(dim=-1).mean(1).max()
    return (found.detach().float() - wanted.detach()).norm(dim=-1).max() / scale.detach()


def milliseconds(attend: Callable[[Tensor], Tensor], case: Case) -> float:
    """Median time of a forward and a backward pass on the CUDA device of the case.

    Raises RuntimeError where the result is not attention, and whatever `attend` raises.
    """
    # Models are also built in inference mode; and torch warns at length of each kernel that it cannot use.
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.cuda.device(case.device),
    ):
        warnings.simplefilter("ignore")
        qkv_BT3NK, upstream_BTNK = drawn(case)
        error = deviation(attend, qkv_BT3NK, upstream_BTNK)
        if not error < ALLOWED:
            raise RuntimeError(f"its result is wrong here, a token by {error:.2g} of its size")
        side = (FILLER_SIZE, FILLER_SIZE)
        filler = torch.ones(side, device=case.device, dtype=torch.float16)
        product = torch.zeros_like(filler)
        times = []
        for _ in range(WARM_UP + REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(FILLER_PRODUCTS):
                torch.mm(filler, filler, out=product)
            begin.record()
            torch.autograd.grad(attend(qkv_BT3NK), qkv_BT3NK, upstream_BTNK)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_UP:])
