"""Many tensors seen as one flat buffer, without a copy where memory already lies that way.

An optimizer over hundreds of parameters wants one kernel call on one address range. Tensors that follow each other in
one storage are that range; others stay a list. Dense tensors with permuted strides (channels_last weights) are read in
storage order, which is all that elementwise work needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory exactly once, in any order of the axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in axes:
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def storage_order(tensor: Tensor) -> Tensor:
    """A dense tensor as it is if contiguous, else a flat view [numel] in the order of its memory."""
    if tensor.is_contiguous():
        return tensor
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def lies_like(tensor: Tensor, model: Tensor) -> bool:
    """Whether `tensor` has the type, device, shape and strides of `model`."""
    return (
        tensor.dtype == model.dtype
        and tensor.device == model.device
        and tensor.shape == model.shape
        and tensor.stride() == model.stride()
    )


def like_strides(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` itself if it lies in memory as `model` does, else a copy that does."""
    if tensor.stride() == model.stride() or (tensor.is_contiguous() and model.is_contiguous()):
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One flat view if the dense `tensors` follow each other in one storage, else each in storage order."""
    first = tensors[0]
    address, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != address or tensor.untyped_storage().data_ptr() != storage:
            return [storage_order(each) for each in tensors]
        address += tensor.numel() * tensor.element_size()
    total = sum(tensor.numel() for tensor in tensors)
    return [first.as_strided((total,), (1,), first.storage_offset())]


def side_by_side(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies of `tensors` in `dtype` that follow each other in one new buffer: `joined` sees one flat range.

    Shapes and, where a tensor is dense, strides are kept. All tensors are on one device; of one dtype if `dtype` is
    None.
    """
    if not tensors:
        return []
    buffer = torch.empty(
        sum(tensor.numel() for tensor in tensors),
        dtype=dtype or tensors[0].dtype,
        device=tensors[0].device,
    )
    parts, start = [], 0
    for tensor in tensors:
        tensor = tensor.detach() if is_dense(tensor) else tensor.detach().contiguous()
        part = buffer.as_strided(tensor.shape, tensor.stride(), start)
        parts.append(part.copy_(tensor))
        start += tensor.numel()
    return parts


def parts_like(params: Sequence[Tensor]) -> list[Tensor]:
    """Zeros with the shapes and strides of `params`, all in one new buffer.

    Side by side if `params` are, so that both are one flat range; otherwise each begins at a multiple of 16 elements,
    which wide accesses like.
    """
    side_by_side = len(joined(params)) == 1
    starts, total = [], 0
    for param in params:
        starts.append(total)
        total += param.numel() if side_by_side else -(-param.numel() // 16) * 16
    buffer = torch.zeros(total, dtype=params[0].dtype, device=params[0].device)
    return [
        buffer.as_strided(param.shape, param.stride(), start)
        for param, start in zip(params, starts, strict=True)
    ]
