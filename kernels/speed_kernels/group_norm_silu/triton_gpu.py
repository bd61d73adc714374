"""Group normalisation with SiLU in Triton on CUDA GPUs (A100, H100, H200, B200).

Forward: a pass of statistics, a small launch that merges them into groups, and a pass that writes y. Backward: a pass
of sums, two small launches that add them over groups and over the batch, and a pass that writes d_x. How a sample is
cut depends on its own shape alone, so a sample's result does not depend on its batch or on the GPU.
"""

# Triton's language is not Python: a jit function's constants and launch options are no parameters that pyright knows.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speed_kernels import launch
from speed_kernels.group_norm_silu import triton_kernels

TILE = 1024  # elements that a program handles at a time: 8 per thread
MIN_COLUMNS, MAX_COLUMNS = 32, 512
NUM_WARPS = 4
MIN_TILES, MAX_TILES = 4, 16  # that a program of a pass of sums takes in turn
APPLY_TILES = 4  # that a program which only writes takes in turn, once there are
MANY_TILES = 8192  # so many in all
PARTS = 1024  # partial results of a group that are merged at a time
SUM_PARTS, SUM_COLUMNS = 128, 16  # tile of the sum over the batch


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    return launch.unavailable()


def tile_columns(num_channels: int) -> int:
    """Channels of a tile: a power of two that divides them where that is wide enough for whole memory transactions."""
    divisor = num_channels & -num_channels
    if divisor >= MIN_COLUMNS:
        return min(divisor, MAX_COLUMNS)
    return min(MAX_COLUMNS, max(16, launch.power_of_two(num_channels)))


def tiles_per_run(num_row_tiles: int) -> int:
    """How many tiles a program of a pass of sums takes in turn."""
    return max(MIN_TILES, min(MAX_TILES, num_row_tiles // 32))


@dataclass(frozen=True)
class Cut:
    """How a batch in channels-last memory is cut into programs."""

    num_samples: int
    num_channels: int
    num_rows: int  # pixels of a sample
    columns: int  # channels of a tile
    rows: int  # pixels of a tile
    num_blocks: int  # of channels
    num_row_tiles: int

    @staticmethod
    def of(x_BCHW: Tensor) -> Cut:
        num_samples, num_channels, height, width = x_BCHW.shape
        columns = tile_columns(num_channels)
        rows = TILE // columns
        return Cut(
            num_samples,
            num_channels,
            height * width,
            columns,
            rows,
            -(-num_channels // columns),
            -(-height * width // rows),
        )

    @property
    def sum_tiles(self) -> int:
        """Tiles of a run of a pass of sums."""
        return tiles_per_run(self.num_row_tiles)

    @property
    def apply_tiles(self) -> int:
        """Tiles of a run of a pass that only writes."""
        num_tiles = self.num_samples * self.num_blocks * self.num_row_tiles
        return APPLY_TILES if num_tiles >= MANY_TILES else 1

    def num_runs(self, num_tiles: int) -> int:
        """Runs of a sample."""
        return -(-self.num_row_tiles // num_tiles)

    def launch(self, kernel: Any, num_tiles: int, *arguments: Any, **constants: Any) -> None:
        """Start a kernel whose last arguments tell the cut: a program for every block of channels of every run."""
        num_runs = self.num_runs(num_tiles)
        kernel[(self.num_samples * num_runs * self.num_blocks,)](
            *arguments,
            self.num_blocks,
            num_runs,
            num_tiles,
            ROWS=self.rows,
            COLUMNS=self.columns,
            num_warps=NUM_WARPS,
            **constants,
        )

    def partial_sums(self, device: torch.device) -> Tensor:
        """Memory for two float32 of every channel of every run of a pass of sums."""
        size = self.num_samples * self.num_runs(self.sum_tiles) * 2 * self.num_channels
        return torch.empty(size, dtype=torch.float32, device=device)

    def pairs(self, device: torch.device) -> Tensor:
        """Memory for two float32 of every channel of every sample."""
        return torch.empty(
            self.num_samples, 2, self.num_channels, dtype=torch.float32, device=device
        )

    def parts(self, num_groups: int) -> int:
        """Block size for merging the partial results of a group."""
        num_parts = self.num_runs(self.sum_tiles) * (self.num_channels // num_groups)
        return min(PARTS, max(32, launch.power_of_two(num_parts)))


def group_norm_silu(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """See `speed_kernels.group_norm_silu.op`; x is in channels-last memory and not empty. Three launches."""
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    cut, device = Cut.of(x_BCHW), x_BCHW.device
    y = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    statistics_B2C = cut.pairs(device)
    partial = cut.partial_sums(device)
    sizes = (cut.num_rows, cut.num_channels)
    with torch.cuda.device_of(x_BCHW):
        cut.launch(triton_kernels.statistics_kernel, cut.sum_tiles, x_BCHW, partial, *sizes)
        triton_kernels.group_kernel[(cut.num_samples * num_groups,)](
            partial,
            statistics_B2C,
            *sizes,
            num_groups,
            cut.num_runs(cut.sum_tiles),
            cut.sum_tiles * cut.rows,
            eps,
            BLOCK=cut.parts(num_groups),
            num_warps=NUM_WARPS,
        )
        tensors = (x_BCHW, weight_C, bias_C, statistics_B2C, y)
        cut.launch(triton_kernels.apply_kernel, cut.apply_tiles, *tensors, *sizes, SILU=silu)
    return y, statistics_B2C


def group_norm_silu_backward(
    d_y_BCHW: Tensor,
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_B2C: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, d_weight, d_bias); d_y and x are in channels-last memory and not empty. Four launches."""
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    cut, device = Cut.of(x_BCHW), x_BCHW.device
    d_x = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    d_weight_C, d_bias_C = torch.empty_like(weight_C), torch.empty_like(bias_C)
    means_B2C = cut.pairs(device)
    partial = cut.partial_sums(device)
    num_runs = cut.num_runs(cut.sum_tiles)
    sizes = (cut.num_rows, cut.num_channels)
    inputs = (d_y_BCHW, x_BCHW, weight_C, bias_C, statistics_B2C)
    with torch.cuda.device_of(x_BCHW):
        cut.launch(triton_kernels.reduce_kernel, cut.sum_tiles, *inputs, partial, *sizes, SILU=silu)
        triton_kernels.group_means_kernel[(cut.num_samples * num_groups,)](
            partial,
            weight_C,
            means_B2C,
            cut.num_channels,
            num_groups,
            num_runs,
            num_groups / (cut.num_channels * cut.num_rows),
            BLOCK=cut.parts(num_groups),
            num_warps=NUM_WARPS,
        )
        triton_kernels.channel_sum_kernel[(-(-cut.num_channels // SUM_COLUMNS),)](
            partial,
            d_weight_C,
            d_bias_C,
            cut.num_samples * num_runs,
            cut.num_channels,
            PARTS=SUM_PARTS,
            COLUMNS=SUM_COLUMNS,
            num_warps=NUM_WARPS,
        )
        tensors = (*inputs, means_B2C, d_x)
        cut.launch(
            triton_kernels.apply_backward_kernel,
            cut.apply_tiles,
            *tensors,
            *sizes,
            SILU=silu,
        )
    return d_x, d_weight_C, d_bias_C
