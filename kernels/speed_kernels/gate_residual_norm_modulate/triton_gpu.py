"""The op on CUDA GPUs (A100, H100, H200, B200): how the Triton kernels are launched.

Forward: one launch. Backward: two, the second of which only adds partial sums. Nothing is read on the host and nothing
is copied to the device, so that the launches can be captured in a CUDA graph. No atomics: shapes alone decide the order
of every sum.

Beside its data the backward pass of XL/2 with 32 samples, all in bfloat16 and with a bias, writes 2 % in partial sums
on an H200 and reads them again, most likely from the second-level cache.
"""

# Launch options are no parameters that pyright knows.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from speed_kernels import e4m3, launch
from speed_kernels.e4m3 import Scaled
from speed_kernels.gate_residual_norm_modulate.triton_backward import backward_kernel, finish_kernel
from speed_kernels.gate_residual_norm_modulate.triton_forward import forward_kernel
from speed_kernels.gate_residual_norm_modulate.triton_rows import pieces

NUM_WARPS = 8
NUM_STAGES = 3  # rows in work, and two more sets of rows on their way
# What a program of the backward pass spends at its start and end, in turns of its loop; an estimate.
FIXED_TURNS = 4
# Tiles of the second backward kernel: one sample's chunks, and all samples' for the bias.
FINISH = {"LINES": 8, "WIDTH": 128, "BIAS_LINES": 64, "BIAS_WIDTH": 32}


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return launch.unavailable()


def vector(*sizes: int) -> int:
    """Elements per access: 128 bits of the widest type. Tensors of a kernel are cut alike, or they would be exchanged
    between threads; float32 beside bfloat16 therefore makes 64-bit accesses of the latter."""
    return 16 // max(sizes)


@functools.cache
def forward_constants(num_channels: int, vector: int) -> dict[str, int]:
    """One row per warp up to 2047 channels; then as many warps to a row as keep it in their registers."""
    warps_per_row = min(NUM_WARPS, max(1, num_channels // 1024))
    warps_per_row = 1 << (warps_per_row.bit_length() - 1)
    return {**pieces(num_channels, vector, warps_per_row), "ROWS": NUM_WARPS // warps_per_row}


@functools.cache
def backward_constants(
    num_channels: int, vector: int, bytes_per_channel: int, shared_bytes: int
) -> dict[str, int]:
    """Two warps to a row of 512 to 2047 channels: more channels to a thread would spill their sums.

    `bytes_per_channel` of a row wait in shared memory, of which a program may have `shared_bytes`; where they are too
    few, loads are not started ahead.
    """
    main = 1 << (num_channels.bit_length() - 1)
    warps_per_row = min(NUM_WARPS, max(1, main // 512 + (main == 512)))
    rows = NUM_WARPS // warps_per_row
    cut = pieces(num_channels, vector, warps_per_row)
    waiting = (NUM_STAGES - 1) * rows * (cut["MAIN"] + cut["REST"]) * bytes_per_channel
    stages = NUM_STAGES if waiting + 2048 <= shared_bytes else 1
    return {**cut, "ROWS": rows, "NUM_STAGES": stages}


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """(processors, shared memory of a program in bytes); of one small GPU in the interpreter."""
    if device.type != "cuda":
        return 4, 99 * 1024
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@functools.cache
def chunks(
    batch: int, num_tokens: int, num_channels: int, rows: int, processors: int
) -> tuple[int, int]:
    """(chunks per sample, tokens per chunk) of the backward pass: the fewest waves of programs, of the fewest turns.

    A processor holds one program at a time. A chunk is less than 2^30 elements long.
    """
    turns = -(-num_tokens // rows)
    fewest = -(-num_tokens * num_channels // 2**30)
    most = max(fewest, min(turns, -(-4 * processors // batch)))

    def cost(num_chunks: int) -> int:
        waves = -(-batch * num_chunks // processors)
        return waves * (-(-turns // num_chunks) + FIXED_TURNS)

    chunk_rows = rows * -(-turns // (min(range(fewest, most + 1), key=cost)))
    return -(-num_tokens // chunk_rows), chunk_rows


def rows_of(tensor_BD: Tensor) -> Tensor:
    """The tensor, or a copy of it if the elements of a row are not neighbours."""
    return tensor_BD if tensor_BD.stride(1) == 1 else tensor_BD.contiguous()


def forward(
    x_BTD: Tensor,
    branch_BTD: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    shift_BD: Tensor,
    scale_BD: Tensor,
    eps: float,
    rows: Scaled | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """See `reference.forward`. One launch. Raises ValueError for `rows` on a GPU that has no e4m3."""
    if rows is not None and (why_not := e4m3.unavailable(x_BTD.device)):
        raise ValueError(why_not)
    x_BTD, shift_BD, scale_BD = x_BTD.contiguous(), rows_of(shift_BD), rows_of(scale_BD)
    batch, num_tokens, num_channels = x_BTD.shape
    device = x_BTD.device
    sum_BTD = None
    if branch_BTD is not None and gate_BD is not None:
        branch_BTD, gate_BD = branch_BTD.contiguous(), rows_of(gate_BD)
        sum_BTD = torch.empty(x_BTD.shape, dtype=x_BTD.dtype, device=device)
    y_BTD = torch.empty(x_BTD.shape, dtype=shift_BD.dtype, device=device)
    mean_BT = torch.empty(batch, num_tokens, dtype=torch.float32, device=device)
    rstd_BT = torch.empty(batch, num_tokens, dtype=torch.float32, device=device)
    if x_BTD.numel() == 0:
        return sum_BTD, y_BTD, mean_BT, rstd_BT
    width = vector(x_BTD.element_size(), shift_BD.element_size())
    constants = forward_constants(num_channels, width)
    num_chunks = -(-num_tokens // constants["ROWS"])
    with torch.cuda.device_of(x_BTD):
        forward_kernel[(batch * num_chunks,)](
            x_BTD,
            branch_BTD,
            gate_BD,
            None if bias_D is None else bias_D.contiguous(),
            shift_BD,
            scale_BD,
            sum_BTD,
            y_BTD,
            mean_BT,
            rstd_BT,
            None if rows is None else rows.values,
            None if rows is None else rows.scale,
            0 if gate_BD is None else gate_BD.stride(0),
            shift_BD.stride(0),
            scale_BD.stride(0),
            num_tokens,
            num_chunks,
            eps,
            **constants,
            GATED=sum_BTD is not None,
            BIASED=bias_D is not None,
            QUANTISED=rows is not None,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        launch.settled(forward_kernel)
    return sum_BTD, y_BTD, mean_BT, rstd_BT


def backward(
    d_sum_BTD: Tensor | None,
    d_y_BTD: Tensor,
    sum_BTD: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
    branch_BTD: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    scale_BD: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
    """See `reference.backward`. Two launches."""
    d_y_BTD, sum_BTD, scale_BD = d_y_BTD.contiguous(), sum_BTD.contiguous(), rows_of(scale_BD)
    mean_BT, rstd_BT = mean_BT.contiguous(), rstd_BT.contiguous()
    batch, num_tokens, num_channels = sum_BTD.shape

    def fresh(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    d_x_BTD, d_shift_BD, d_scale_BD = fresh(sum_BTD), fresh(scale_BD), fresh(scale_BD)
    d_branch_BTD = d_gate_BD = d_bias_D = None
    num_sums = 2
    waiting: list[Tensor] = [d_y_BTD, sum_BTD]
    if branch_BTD is not None and gate_BD is not None:
        branch_BTD, gate_BD = branch_BTD.contiguous(), rows_of(gate_BD)
        d_branch_BTD, d_gate_BD = fresh(branch_BTD), fresh(gate_BD)
        num_sums = 3
        waiting.append(branch_BTD)
    if bias_D is not None:
        bias_D = bias_D.contiguous()
        d_bias_D = fresh(bias_D)
        num_sums = 4
    if d_sum_BTD is not None:
        d_sum_BTD = d_sum_BTD.contiguous()
        waiting.append(d_sum_BTD)
    results = d_x_BTD, d_branch_BTD, d_gate_BD, d_shift_BD, d_scale_BD, d_bias_D
    if sum_BTD.numel() == 0:
        for sums in (d_gate_BD, d_shift_BD, d_scale_BD, d_bias_D):
            if sums is not None:
                sums.zero_()
        return results

    processors, shared_bytes = device_limits(sum_BTD.device)
    width = vector(sum_BTD.element_size(), scale_BD.element_size())
    bytes_per_channel = sum(tensor.element_size() for tensor in waiting)
    constants: dict[str, Any] = backward_constants(
        num_channels, width, bytes_per_channel, shared_bytes
    )
    num_chunks, chunk_rows = chunks(batch, num_tokens, num_channels, constants["ROWS"], processors)
    partial = torch.empty(
        batch, num_chunks, num_sums, num_channels, dtype=torch.float32, device=sum_BTD.device
    )
    gate_stride = 0 if gate_BD is None else gate_BD.stride(0)
    num_programs = batch * -(-num_channels // FINISH["WIDTH"])
    if bias_D is not None:
        num_programs += -(-num_channels // FINISH["BIAS_WIDTH"])
    with torch.cuda.device_of(sum_BTD):
        backward_kernel[(batch * num_chunks,)](
            d_sum_BTD,
            d_y_BTD,
            sum_BTD,
            mean_BT,
            rstd_BT,
            branch_BTD,
            gate_BD,
            scale_BD,
            d_x_BTD,
            d_branch_BTD,
            partial,
            gate_stride,
            scale_BD.stride(0),
            num_tokens,
            num_chunks,
            chunk_rows,
            **constants,
            NUM_SUMS=num_sums,
            HAS_D_SUM=d_sum_BTD is not None,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
        finish_kernel[(num_programs,)](
            partial,
            gate_BD,
            bias_D,
            d_gate_BD,
            d_shift_BD,
            d_scale_BD,
            d_bias_D,
            gate_stride,
            batch,
            num_chunks,
            D=num_channels,
            NUM_SUMS=num_sums,
            **FINISH,
            num_warps=4,
            enable_fp_fusion=True,
        )
        launch.settled(backward_kernel)
        launch.settled(finish_kernel)
    return results
