"""Matrix products in e4m3, eight bits a number, with scales made anew at every call: an experiment.

`convert` swaps the large linear layers of a network for `Fp8Linear`: same parameters, same names, but
the product and both products of its backward pass multiply e4m3 by e4m3, summed in float32. e4m3 has
three bits of mantissa and ends at 448, so each operand is divided by a scale, its largest magnitude
over 448: one scale for the whole operand, or one for each of its rows.
"""

# Shape suffixes: M rows of the input (all leading dimensions as one), K inputs and N outputs of the
# layer; R, S rows and C columns of any matrix. Every product here is rows times rows, A_RC B_SC^T,
# which is the one layout (row-major times column-major) that the hardware has for e4m3.

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from speed_kernels.e4m3 import Scaled, Scaling, quantise
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Network = TypeVar("Network", bound=nn.Module)

UNIT = 16  # the hardware multiplies in pieces of this size
# The keys and values of captions are not among them: few rows, seldom a multiple of 16.
BLOCK_PRODUCT = re.compile(r"blocks\.\d+\.(attn\.(qkv|proj)|cross\.(q|proj)|mlp\.(fc1|fc2))")


def fp8_unavailable(device: torch.device) -> str | None:
    """Why products in e4m3 cannot run on `device`, in one sentence; None if they can.

    CPUs compute the same numbers, slower than in float32: to see what e4m3 does to a loss.
    """
    cure = "choose model.products=native"
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no scaled matrix product (_scaled_mm); {cure}"
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return f"fp8 products run on CUDA devices and CPUs, not on {device.type}; {cure}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"fp8 products run on CUDA devices, and torch sees none; {cure}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return (
            f"fp8 products need a GPU of compute capability 8.9 or newer, and "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}; {cure}"
        )
    return None


def product(a: Scaled, b: Scaled, bias_S: Tensor | None = None) -> Tensor:
    """A_RC B_SC^T (+ bias) -> bf16 [R, S], summed in float32. C and S are multiples of 16.

    bf16 is the one output that both kinds of scale have on every GPU. `_scaled_mm` has the same
    signature in torch 2.11 and 2.13; their new torch.nn.functional.scaled_mm gains nothing here.
    """
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a.values,
        b.values.t(),
        scale_a=a.scale,
        scale_b=b.scale.t(),
        bias=None if bias_S is None else bias_S.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,  # true keeps fewer bits of the running sum
    )


class _Fp8Linear(torch.autograd.Function):
    """x_MK w_NK^T + bias_N and its gradients."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_MK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        scaling: Scaling,
        values_MK: Tensor | None,
        scale_M1: Tensor | None,
    ) -> Tensor:
        if values_MK is None or scale_M1 is None:
            x8 = quantise(x_MK, scaling)
        else:
            x8 = Scaled(values_MK, scale_M1)
        out_MN = product(x8, quantise(weight_NK, scaling), bias_N)
        # One scale serves the transposed matrix too, and e4m3 is half of bf16 to keep. A scale for
        # each row does not: the gradient needs one for each column.
        ctx.save_for_backward(x8.values if scaling == "tensor" else x_MK, x8.scale, weight_NK)
        ctx.scaling, ctx.x_dtype = scaling, x_MK.dtype
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return out_MN.to(x_MK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_MN: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        kept_MK, scale, weight_NK = ctx.saved_tensors
        scaling: Scaling = ctx.scaling
        d_x = d_weight = d_bias = None
        d_out8 = quantise(d_out_MN, scaling)
        if ctx.needs_input_grad[0]:
            d_x = product(d_out8, quantise(weight_NK.t(), scaling)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            if scaling == "tensor":
                x8_KM = Scaled(kept_MK.t().contiguous(), scale)
                d_out8_NM = Scaled(d_out8.values.t().contiguous(), d_out8.scale)
            else:
                x8_KM = quantise(kept_MK.t(), scaling)
                d_out8_NM = quantise(d_out_MN.t(), scaling)
            d_weight = product(d_out8_NM, x8_KM).to(weight_NK.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = d_out_MN.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None, None, None


def fp8_linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    scaling: Scaling,
    rows: Scaled | None = None,
) -> Tensor:
    """x [..., K] times weight_NK transposed, plus bias_N, with e4m3 operands -> [..., N] in x's dtype.

    rows: what quantising x by rows gives, [..., K] and [..., 1], where whoever made x made it, too.
    x, weight and bias: bfloat16 or float32, any strides. Everything passes through bf16, whatever
    x's dtype, and so do the gradients of x and of the weight, which are e4m3 products too; the bias's
    gradient is a float32 sum. The host never waits. An overflow of bf16 gives an infinity, a NaN or an
    infinity in x or in the weight a result that is not finite. No second derivatives.

    Raises ValueError for other dtypes and scalings, and for sizes that are not multiples of 16: K and
    N always, and the product of x's leading sizes where the weight's gradient is a sum over them.
    """
    if scaling not in ("tensor", "row"):
        raise ValueError(f"scaling {scaling!r} must be 'tensor' or 'row'")
    for name, tensor in (("x", x), ("weight", weight_NK), ("bias", bias_N)):
        if tensor is not None and tensor.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"{name} of an fp8 product must be bfloat16 or float32, not {tensor.dtype}; cast it"
            )
    num_outputs, num_inputs = weight_NK.shape
    if x.shape[-1] != num_inputs:
        raise ValueError(
            f"x has {x.shape[-1]} columns and the weight {num_inputs}; make them equal"
        )
    check_sizes(num_inputs, num_outputs, "the layer")
    x_MK = x.reshape(-1, num_inputs)
    num_rows = x_MK.shape[0]
    if num_rows == 0 or (num_rows % UNIT and weight_NK.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            f"x has {num_rows} rows (samples x tokens), and the fp8 product that sums the weight's "
            f"gradient over them needs a multiple of {UNIT} above 0; change train.micro_batch, or "
            "choose native products"
        )
    made: tuple[Tensor | None, ...] = (None, None)
    if rows is not None:
        made = (rows.values.reshape(x_MK.shape), rows.scale.reshape(num_rows, 1))
    out_MN: Any
    with torch.autocast(x.device.type, enabled=False):  # it would reach into the product on a CPU
        out_MN = _Fp8Linear.apply(x_MK, weight_NK, bias_N, scaling, *made)
    return out_MN.view(*x.shape[:-1], num_outputs)


def check_sizes(num_inputs: int, num_outputs: int, name: str) -> None:
    """Raise ValueError unless both sizes of a layer are multiples of 16."""
    for what, size in (("inputs", num_inputs), ("outputs", num_outputs)):
        if size % UNIT or size == 0:
            raise ValueError(
                f"{name} has {size} {what}, and an fp8 product needs a multiple of {UNIT}; change "
                "model.hidden_size or model.mlp_ratio, or choose native products"
            )


class Fp8Linear(nn.Linear):
    """nn.Linear with products in e4m3; the same parameters under the same names.

    Under autocast the input is cast as nn.Linear's would be; the weight is quantised from what it
    is. bias_later: the bias is a parameter only, for whatever comes next to add.
    Raises ValueError for sizes that are not multiples of 16.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scaling: Scaling,
        bias_later: bool = False,
    ) -> None:
        check_sizes(in_features, out_features, "the layer")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scaling: Scaling = scaling
        self.bias_later = bias_later

    @property
    def takes_rows(self) -> bool:
        """Whether `forward` multiplies its input's rows in e4m3, which a kernel before it can make."""
        return self.scaling == "row"

    def forward(self, input: Tensor, rows: Scaled | None = None) -> Tensor:
        """input [..., K] -> [..., N]; rows: see `fp8_linear`."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and input.dtype != torch.get_autocast_dtype(kind):
            input, rows = input.to(torch.get_autocast_dtype(kind)), None  # rows of another rounding
        bias_N = None if self.bias_later else self.bias
        return fp8_linear(input, self.weight, bias_N, self.scaling, rows)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scaling={self.scaling}"


def block_product(name: str) -> bool:
    """Whether a DiT's layer of this name is one of a block's products over the picture's tokens."""
    return BLOCK_PRODUCT.fullmatch(name) is not None


def convert(
    module: nn.Module, scaling: Scaling, names: Callable[[str], bool] = block_product
) -> int:
    """Swap every nn.Linear in `module` whose dotted name `names` accepts for an `Fp8Linear`.

    In place, with the very same Parameter objects, on any device (also meta). Of a subclass of
    nn.Linear only the attribute `bias_later` is carried over, not the forward pass. Returns how many
    were swapped. Raises ValueError, before anything is changed, for a layer whose sizes do not fit.
    """
    chosen = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not isinstance(layer, Fp8Linear) and names(name)
    ]
    for name, layer in chosen:
        check_sizes(layer.in_features, layer.out_features, name)
    for name, layer in chosen:
        swapped = Fp8Linear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            device="meta",  # no memory: the parameters are replaced at once
            scaling=scaling,
            bias_later=getattr(layer, "bias_later", False),
        )
        swapped.weight, swapped.bias = layer.weight, layer.bias
        module.set_submodule(name, swapped.train(layer.training))
    return len(chosen)


def with_products(
    network: Network, products: Literal["native", "fp8_tensor", "fp8_row"]
) -> Network:
    """The same network, its blocks' products as said. Raises ValueError where they cannot run, or sizes do not fit."""
    if products != "native":
        if why_not := fp8_unavailable(next(network.parameters()).device):
            raise ValueError(f"model.products={products}: {why_not}")
        convert(network, "row" if products == "fp8_row" else "tensor")
    return network
