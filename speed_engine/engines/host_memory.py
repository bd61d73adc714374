"""Freed memory stays with a process that trains on a CPU.

In a virtual machine a fresh page can cost as much as the arithmetic on it, and a training step frees and asks for the
same gigabytes again and again. glibc gives large blocks back to the system at once unless it is told otherwise.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(device: torch.device) -> str:
    """Tell the allocator, once, before the large tensors are made; returns what was decided, for the manifest."""
    if device.type != "cpu":
        return f"the allocator's own way: training is on {device.type}"
    if given := [name for name in SETTINGS if name in os.environ]:
        return f"as {', '.join(given)} says"
    if sys.platform != "linux":
        return f"the allocator's own way: {sys.platform} has no mallopt"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return "the allocator's own way: this C library has no mallopt"
    done = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)
    return "freed memory stays with the process" if done else "the allocator refused mallopt"
