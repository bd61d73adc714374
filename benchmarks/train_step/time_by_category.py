"""The profiler's view of a training step: milliseconds by category.

On a GPU the time is that of its kernels. An operation belongs to the optimizer if the optimizer or the EMA called it,
else to what its name says. The loss of plain providers is elementwise operations like any other; only our fused ops can
be told apart as diffusion ops.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType

MATRIX, ATTENTION, NORM = "matrix products", "attention", "norm and elementwise"
DIFFUSION, OPTIMIZER, OTHER = "diffusion ops", "optimizer and EMA", "other"
IDLE, UNSEEN = "idle", "not recorded"
CATEGORIES = (MATRIX, ATTENTION, NORM, DIFFUSION, OPTIMIZER, OTHER)
# The first that matches an operation's or a kernel's name.
NAMES: tuple[tuple[str, str], ...] = (
    (
        OPTIMIZER,
        r"adam|multi_tensor|foreach|square_sum|^(update|update_list|square|square_total|prepare)_kernel",
    ),
    (DIFFUSION, r"speed_kernels::(noise|.*loss)|^(noise|loss)_kernel"),
    (ATTENTION, r"flash|fmha|attention|mha_|softmax"),
    (
        MATRIX,
        r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|triton_tem|::(addmm|mm|bmm|baddbmm|matmul|linear)|conv|mkldnn",
    ),
    (
        NORM,
        r"norm|^(forward|backward|column_sum)\w*_kernel|gelu|silu|sigmoid|elementwise|reduce|triton_|cpp_fused|glue|modulat|kernel_impl|"
        r"::(mul|add|sub|div|neg|sum|mean|exp|log|tanh|cat|copy_|_to_copy|fill_|zero_|where|pow|sqrt|clamp|index|"
        r"lerp|addcmul|embedding|cos|sin|square|le|lt|gt|eq|clone|stack|select_backward|slice_backward|randn|normal_|"
        r"arange|minimum|maximum|rsub|reciprocal|addcdiv)",
    ),
)
SCOPES = re.compile(r"Optimizer\.step|^ema$")


def category(name: str, scopes: Iterable[str] = ()) -> str:
    """What an operation or kernel called `name`, inside the named scopes, is for."""
    if any(SCOPES.search(scope) for scope in scopes):
        return OPTIMIZER
    for which, pattern in NAMES:
        if re.search(pattern, name, re.IGNORECASE):
            return which
    return OTHER


def profile(step: Callable[[], object], device: torch.device, steps: int) -> dict[str, Any]:
    """`milliseconds`, `calls` and `longest` of one step, the mean of `steps`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with recording(activities=activities) as recorded:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events: Any = recorded.events()
    parts = list(on_gpu(events) if device.type == "cuda" else on_cpu(events))
    seconds: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    calls: Counter[str] = Counter()
    by_name: dict[tuple[str, str], float] = defaultdict(float)
    for name, scopes, microseconds in parts:
        what = category(name, scopes)
        seconds[what] += microseconds / 1e3 / steps
        calls[what] += 1
        by_name[name, what] += microseconds / 1e3 / steps
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:15]
    return {
        "milliseconds": seconds,
        "calls": {what: calls[what] / steps for what in CATEGORIES},
        "longest": [(name, what, value) for (name, what), value in longest],
    }


def _scopes(event: Any) -> list[str]:
    found = []
    while (event := event.cpu_parent) is not None:
        found.append(event.name)
    return found


def on_cpu(events: Iterable[Any]) -> Iterable[tuple[str, list[str], float]]:
    """(name, enclosing names, microseconds of its own) of every operation on the host."""
    for event in events:
        if event.self_cpu_time_total > 0 and not event.name.startswith(("ProfilerStep", "##")):
            yield event.name, _scopes(event), float(event.self_cpu_time_total)


def on_gpu(events: Iterable[Any]) -> Iterable[tuple[str, list[str], float]]:
    """(name, names of what launched it, microseconds) of every kernel and copy.

    Those that no operation launched, as from a CUDA graph, have their name alone.
    """
    events = list(events)
    launched: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                launched[kernel.name] += 1
                yield kernel.name, [event.name, *_scopes(event)], float(kernel.duration)
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if launched[event.name] > 0:
                launched[event.name] -= 1
            elif not getattr(event, "is_user_annotation", False):
                yield event.name, [], float(event.device_time_total)


def with_rest(
    milliseconds: dict[str, float], wall_ms: float, device: torch.device
) -> dict[str, float]:
    """The categories, and what the wall clock has beyond them: an idle GPU, or what a CPU's profiler cannot see."""
    rest = IDLE if device.type == "cuda" else UNSEEN
    return {**milliseconds, rest: max(0.0, wall_ms - sum(milliseconds.values()))}
