"""The rows of a step table as the ops read them: their columns, what is refused, and samples for tests.

Shape legend: B samples, T rows of the table, 8 columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from speed_kernels import philox
from speed_kernels.contract import check_dtype

# Columns of a row, as in csrc/elements.h.
A, B, C, D, W, LOGVAR_MIN, LOGVAR_MAX, MEAN_GAP = range(8)
NUM_COLUMNS = 8


def check_table(rows_T8: Tensor, address_2: Tensor, x0: Tensor, seed: int, backend: str) -> None:
    """Refuse tensors and seeds that no kernel can take. Raises ValueError."""
    if x0.dim() < 1:
        raise ValueError("x0 has no batch dimension; give it the shape [batch, ...]")
    check_dtype("x0", x0.dtype, backend)
    if rows_T8.dim() != 2 or rows_T8.shape[1] != NUM_COLUMNS or rows_T8.dtype != torch.float32:
        raise ValueError(
            f"rows_T8 is {rows_T8.dtype} {tuple(rows_T8.shape)}; it must be float32 [T, 8]"
        )
    check_address(address_2, seed)
    for name, tensor in (("rows_T8", rows_T8), ("address_2", address_2)):
        if tensor.device != x0.device:
            raise ValueError(f"{name} is on {tensor.device} but x0 on {x0.device}; move it there")


def check_address(address_2: Tensor, seed: int) -> None:
    """Refuse what addresses no noise. Raises ValueError."""
    if address_2.shape != (2,) or address_2.dtype != torch.int64:
        raise ValueError(
            f"address_2 is {address_2.dtype} {tuple(address_2.shape)}; it must be int64 [2]: (step, first slot)"
        )
    philox.key_of(seed)


def check_rows(row_B: Tensor, x0: Tensor) -> None:
    """Refuse rows that are not one for every sample, on the samples' device. Raises ValueError."""
    if row_B.shape != (x0.shape[0],) or row_B.dtype != torch.int64:
        raise ValueError(
            f"row_B is {row_B.dtype} {tuple(row_B.shape)}; it must be int64 [{x0.shape[0]}], as the noise op returns it"
        )
    if row_B.device != x0.device:
        raise ValueError(f"row_B is on {row_B.device} but x0 on {x0.device}; move it there")


def no_such_row(row_B: Tensor, sample: int, num_rows: int) -> ValueError:
    """The error for a sample's row that the table does not have."""
    return ValueError(
        f"row_B[{sample}] = {int(row_B[sample])} is no row of a table of {num_rows} rows; "
        "pass the rows that the noise op returned for the same table"
    )


def column(rows_T8: Tensor, row_B: Tensor, index: int, x0: Tensor) -> Tensor:
    """A column of every sample's row, float64, shaped to multiply x0. Raises IndexError for a row that is not there."""
    # index_select: an index in brackets would count negative rows from the end.
    return rows_T8[:, index].double().index_select(0, row_B).view(-1, *[1] * (x0.dim() - 1))


def epsilon(shape: Sequence[int], address_2: Tensor, seed: int) -> Tensor:
    """The noise of a batch of `shape`, float64, in plain torch on the address's device."""
    step, first_slot = address_2.unbind()
    slot_B = first_slot + torch.arange(shape[0], device=address_2.device)
    num_elements = math.prod(shape[1:])
    return philox.normals(seed, step, slot_B, philox.STREAM_EPS, num_elements).view(*shape)


def samples() -> Iterator[
    tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, bool, torch.dtype]
]:
    """Small batches and tables, over shapes, dtypes and options: what `noise` takes, in its order, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 8, 8), (5, 3, 7, 3), (2, 1), (4,), (0, 4, 2, 2))
    dtypes = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
    dtypes += ((torch.float32, torch.bfloat16), (torch.float16, torch.float32))
    for index, shape in enumerate(shapes):
        num_rows = (7, 1000, 1, 33, 20)[index]
        density = torch.rand(num_rows, generator=generator, dtype=torch.float64) + 0.1
        cdf_T = (density.cumsum(0) / density.sum() * 2**32).round().long()
        cdf_T[-1] = 2**32
        rows_T8 = torch.rand(num_rows, NUM_COLUMNS, generator=generator)
        time_T = torch.arange(num_rows, dtype=torch.float32)
        x0 = torch.randn(shape, generator=generator)
        address_2 = torch.tensor([11 + index, 6 * index])
        for x0_dtype, dtype in dtypes if index == 0 else dtypes[index % 4 : index % 4 + 1]:
            tensors = (x0.to(x0_dtype), cdf_T, rows_T8, time_T, address_2)
            yield (*tensors, 2**40 + 17, 32, index % 2 == 0, dtype)
