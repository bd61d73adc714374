"""Dropout of images in channels-last memory, with addressed randomness: nothing is stored, nothing is streamed.

With the random word r of an element (`speed_kernels.philox`, 32 bits) and the threshold round(p 2^32):

    y = x / (1 - p) where r >= threshold, else 0          d_x = the same of d_y, so that the op is its own gradient

N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014, section 10, scaled in
training. The counter of element e of sample b in a layer is (e // 4, first slot + b, step, stream), of whose four words
e takes number e % 4; the stream's word is `philox.STREAM_DROPOUT` + 256 layer. Elements of a sample are counted in
the order of channels-last memory. A word is a function of seed, step, global slot, layer and element alone, so that any
split of a batch, any number of processes and any resume drop the same.

Tolerance: one float32 product, rounded once to x's dtype; which elements are dropped is exact.

Shape legend: B samples, C channels, H rows and W columns of an image, 3 numbers (seed, step, first global slot).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from speed_kernels import contract
from speed_kernels.dispatch import DirectFunction, direct

MAX_LAYER = 2**24 - 1


def dropout(x_BCHW: Tensor, address_3: Tensor, *, layer: int, p: float, backend: str) -> Tensor:
    """x with a share p of its elements zeroed. Returns y [B, C, H, W], like x and in channels-last memory.

    x_BCHW      float32, bfloat16 or float16 (float64 on the reference); any strides, but all except channels-last are
                copied
    address_3   int64 (seed in [0, 2^63), step, global slot of the first sample), on x's device; never read by the host
    layer       0 to 2^24 - 1: two uses in one network give two numbers
    p           in [0, 1)
    backend     triton, cpp or reference (`speed_kernels.contract.choose`)

    Differentiable once, by x. Autocast changes no dtype. Raises ValueError on wrong arguments.
    """
    if direct(x_BCHW):
        y_BCHW: Any = _Dropout.apply(x_BCHW, address_3, layer, float(p), backend)
        return y_BCHW
    return dropout_op(x_BCHW, address_3, layer, float(p), backend)


class _Dropout(DirectFunction):
    """`dropout_op` without torch's dispatcher."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x_BCHW: Tensor, address_3: Tensor, layer: int, p: float, backend: str
    ) -> Tensor:
        ctx.options = (layer, p, backend)
        ctx.save_for_backward(address_3)
        return _computed(x_BCHW, address_3, layer, p, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_BCHW: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return _computed(d_y_BCHW, *ctx.saved_tensors, *ctx.options), None, None, None, None


@torch.library.custom_op("speed_kernels::dropout", mutates_args=())
def dropout_op(x_BCHW: Tensor, address_3: Tensor, layer: int, p: float, backend: str) -> Tensor:
    """See `dropout`."""
    return _computed(x_BCHW, address_3, layer, p, backend)


def _computed(x_BCHW: Tensor, address_3: Tensor, layer: int, p: float, backend: str) -> Tensor:
    _check(x_BCHW, address_3, layer, p, backend)
    if x_BCHW.numel() == 0:
        return _like(x_BCHW)
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    return contract.implementation("dropout", backend).dropout(x_BCHW, address_3, layer, p)


@dropout_op.register_fake
def _(x_BCHW: Tensor, address_3: Tensor, layer: int, p: float, backend: str) -> Tensor:
    _check(x_BCHW, address_3, layer, p, backend)
    return _like(x_BCHW)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, address_3, *ctx.options = inputs
    ctx.save_for_backward(address_3)


def _backward(ctx: Any, d_y_BCHW: Tensor) -> tuple[Tensor | None, ...]:
    return dropout_op(d_y_BCHW, *ctx.saved_tensors, *ctx.options), None, None, None, None


dropout_op.register_autograd(_backward, setup_context=_setup_context)


def threshold(p: float) -> int:
    """Words below it are dropped; at most 2^32 - 1."""
    return min(round(p * 2**32), 2**32 - 1)


def _like(x_BCHW: Tensor) -> Tensor:
    return torch.empty_like(x_BCHW, memory_format=torch.channels_last)


def _check(x_BCHW: Tensor, address_3: Tensor, layer: int, p: float, backend: str) -> None:
    if x_BCHW.dim() != 4:
        raise ValueError(
            f"x_BCHW has the shape {tuple(x_BCHW.shape)}; it must be [B, C, H, W], so unsqueeze or flatten it"
        )
    contract.check_dtype("x_BCHW", x_BCHW.dtype, backend)
    if address_3.shape != (3,) or address_3.dtype != torch.int64:
        raise ValueError(
            f"address_3 is {address_3.dtype} {tuple(address_3.shape)}; it must be int64 [3]: seed, step, first slot"
        )
    if address_3.device != x_BCHW.device:
        raise ValueError(
            f"address_3 is on {address_3.device} but x on {x_BCHW.device}; move it there"
        )
    if not 0 <= layer <= MAX_LAYER:
        raise ValueError(f"layer={layer} is outside 0 .. {MAX_LAYER}; number the layers from 0")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p={p} is outside [0, 1); 1 would leave nothing")


def sample_inputs(
    device: torch.device | str = "cpu", backend: str = "reference"
) -> Iterator[tuple[Any, ...]]:
    """Small argument tuples of the op that cover shapes, dtypes and options; for opcheck and for tests."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, 12, 5, 3), (3, 6, 1, 1), (2, 7, 4, 5), (0, 4, 2, 2), (2, 4, 0, 3), (1, 40, 9, 8))
    address_3 = torch.tensor([2**40 + 7, 11, 5], device=device)
    for index, shape in enumerate(shapes):
        x_BCHW = torch.randn(shape, generator=generator)
        for dtype in contract.DTYPES if index == 0 else contract.DTYPES[index % 3 : index % 3 + 1]:
            x = x_BCHW.to(device, dtype)
            if index % 2:
                x = x.contiguous(memory_format=torch.channels_last)
            yield x, address_3, (0, 3, MAX_LAYER)[index % 3], (0.13, 0.5, 0.0)[index % 3], backend
