"""What the launches of the Triton kernels share: whether they can run, words as they take them, runs and tiles.

Imports no triton, so that it can be asked anywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from speed_kernels import philox

MAX_TILES = 8  # that a program takes in turn


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}; 8.0 (A100) or newer is needed"
    return None


def capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def signed_key(seed: int) -> tuple[int, int]:
    """The two words of a seed's key as signed integers of the same bits: kernels take words as int32."""
    low, high = (word - 2**32 if word >= 2**31 else word for word in philox.key_of(seed))
    return low, high


def tiles_per_program(batch: int, num_elements: int, tile: int, device: torch.device) -> int:
    """How many tiles of a sample a program takes in turn: more once there are enough programs to fill the GPU four
    times over."""
    tiles = batch * -(-num_elements // tile)
    num_processors = 1
    if device.type == "cuda":
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    per_program = 1
    while per_program < MAX_TILES and tiles > 2 * per_program * 64 * num_processors:
        per_program *= 2
    return per_program


def is_wide(num_elements: int, tile: int) -> bool:
    """Whether the last tile of a sample reaches elements that 32 bits cannot number."""
    return num_elements >= 2**31 - MAX_TILES * tile


def run_length(*tensors: Tensor) -> int:
    """Consecutive elements per thread: a 128-bit access of the narrowest tensor."""
    return 16 // min(tensor.element_size() for tensor in tensors)


def settled(kernel: Any) -> None:
    """Call it behind a launch: at every launch Triton compares a kernel's global constants with those that it was
    compiled with, and ours never change. They are part of the cached kernel's name, which is fixed by now."""
    if getattr(kernel, "used_global_vals", None):
        kernel.used_global_vals = {}


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number` >= 1. Triton's own takes microseconds a call."""
    return 1 << (number - 1).bit_length()
