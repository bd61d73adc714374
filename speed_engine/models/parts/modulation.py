"""All adaLN projections of a network at once: they all see the same conditioning vector.

Where the weights lie one behind the other in memory (where an engine keeps all parameters in one
buffer, in the order that the model asks for) the many small products are one large one, forward and
backward. Elsewhere (DeepSpeed has its own places for parameters) each is made by itself; the numbers
are the same up to rounding.

Among several processes the product is cut by depth. The gradients of one are complete only after the
last block's backward pass, with nothing left beside which their sum over processes, a third of all,
could travel; those of the parts of the deeper blocks set off earlier. For that a part must be made
just before its first block: autograd takes what was made last first.
"""

# Shape suffixes: B samples, D hidden size, X outputs of one projection, S outputs of all.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors follow one another in one storage."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == storage and tensor.dtype == first.dtype
        if not same or tensor.data_ptr() != end or not tensor.is_contiguous():
            return False
        end += tensor.nbytes
    return True


def in_one_piece(linears: Sequence[nn.Linear], network: nn.Module) -> list[nn.Parameter]:
    """All parameters of the network: the layers' weights one behind the other, their biases, then the others."""
    first = [cast("nn.Parameter", linear.weight) for linear in linears]
    first += [cast("nn.Parameter", linear.bias) for linear in linears]
    known = {id(parameter) for parameter in first}
    return first + [each for each in network.parameters() if id(each) not in known]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Adjacent tensors as one, along their first dimension; no copy."""
    first = tensors[0].detach()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


class _OneProduct(torch.autograd.Function):
    """c W^T + b for adjacent weights; the gradients of the single weights are parts of one."""

    @staticmethod
    def forward(ctx: Any, c_BD: Tensor, *parameters: Tensor) -> Tensor:
        half = len(parameters) // 2
        weight_SD = _joined(parameters[:half])
        ctx.save_for_backward(c_BD, *parameters[:half])
        ctx.sizes = [parameter.shape[0] for parameter in parameters[:half]]
        return F.linear(c_BD, weight_SD, _joined(parameters[half:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BS,) = grads
        c_BD, *weights = ctx.saved_tensors
        grad_weights = (grad_BS.T @ c_BD).split(ctx.sizes)
        return grad_BS @ _joined(weights), *grad_weights, *grad_BS.sum(0).split(ctx.sizes)


PARTS = 4  # of the product, among several processes


def parts(num_layers: int) -> list[slice]:
    """The layers of each product."""
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    num_parts = 1 if alone else min(PARTS, num_layers)
    ends = [num_layers * part // num_parts for part in range(num_parts + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def project_all(
    c_BD: Tensor, linears: Sequence[nn.Linear], same_anywhere: bool = False
) -> Iterator[Tensor]:
    """[B, D] -> for every layer [B, X]: rows of one large product, so with its stride, or tensors
    of their own. Take each when it is needed. same_anywhere: as in one process, whatever there is."""
    # autocast casts the weights one by one, and a compiler cannot look at addresses.
    alone = torch.is_autocast_enabled(c_BD.device.type) or torch.compiler.is_compiling()
    # Not by attribute: ZeRO 3 would fetch every parameter that is touched, and all at once.
    weights, biases = zip(*(linear.parameters(recurse=False) for linear in linears), strict=True)
    here = all(
        weight.shape == (linear.out_features, linear.in_features)
        for weight, linear in zip(weights, linears, strict=True)
    )
    if alone or not (here and adjacent(weights) and adjacent(biases)):
        return iter([linear(c_BD) for linear in linears])
    if same_anywhere or len(cut := parts(len(weights))) == 1:
        return iter(_product(c_BD, weights, biases))
    return chain.from_iterable(_product(c_BD, weights[part], biases[part]) for part in cut)


def _product(c_BD: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    outputs_BS: Any = _OneProduct.apply(c_BD, *weights, *biases)
    return list(outputs_BS.split([weight.shape[0] for weight in weights], dim=1))
