"""Memory of the training-step benchmark: what is free, what providers need, what a step takes, who lives together.

Our two engines keep states of their own. Where both do not fit beside what the plain rivals need, the providers live in
two houses, one after the other: everybody with `ours-torch`, then `reference` with `ours-deepspeed`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from benchmarks.train_step.problem import TrainCase

PLAIN = ("reference", "eager", "compile")
OURS = ("ours-torch", "ours-deepspeed")
# Bytes a parameter that an engine, or all plain rivals together, hold for good.
HELD = {"ours-torch": 18, "ours-deepspeed": 20, "plain": 16}
# Bytes that a step needs beyond: a parameter (gradients, casts, copies), and an element and block (kept for backward).
# In float32 only on a CPU: where it does not fit a GPU, the reference takes its batch in parts.
PASSING = {"cpu": ((4, 115), (6, 60)), "cuda": ((6, 60),)}
SPARE = 1.5e9


def available_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not say how much memory is available")


def needed_bytes(case: TrainCase, names: Sequence[str], device: torch.device) -> float:
    """What the providers of one house need together: states, and the hungriest step."""
    engines = [name for name in names if name in HELD]
    held = sum(HELD[name] for name in engines) if engines else HELD["plain"]
    work = case.work
    step = max(a * work.parameters + b * work.elements for a, b in PASSING[device.type])
    return held * work.parameters + step + SPARE


def plan(
    case: TrainCase, device: torch.device, free: float, wanted: Collection[str] = (*PLAIN, *OURS)
) -> list[list[str]]:
    """Who lives with whom: all that are `wanted`, and `reference`, in one house if `free` bytes allow it."""
    names = [name for name in (*PLAIN, *OURS) if name in wanted or name == "reference"]
    if not set(OURS) <= set(names) or needed_bytes(case, names, device) <= free:
        return [names]
    return [[name for name in names if name != OURS[1]], ["reference", OURS[1]]]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """How much memory `call` takes beyond what is there already; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _trim()  # freed memory that the process keeps would hide what the call takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def _trim() -> None:
    """Let the C library give freed memory back to the system, where it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def pool_bytes(device: torch.device) -> int:
    """Memory that CUDA graphs keep for themselves."""
    if device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) != (0, 0))


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        _trim()
