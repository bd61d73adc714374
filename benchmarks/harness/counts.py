"""What a wall clock does not tell about a call on a CUDA device: launches, waits of the host, time on the GPU alone."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.refusals import GateError

GRAPH_CALLS = 10  # calls in one captured graph
GRAPH_REPLAYS = 30
HOST_CALLS = 10


def refuse_waiting(call: Callable[[], object]) -> None:
    """Run `call` where torch forbids every wait of the host. Raises GateError if it waits."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        raise GateError(f"the host waits for the device: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_syncs(call: Callable[[], object]) -> int:
    """How often `call` makes the host wait for the device, by torch's own account (blocking copies included)."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def host_time(call: Callable[[], object]) -> float:
    """Seconds of a processor that `call` costs this thread, the least of a few: what the GPU must take to hide it."""
    times = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        begin = time.thread_time()
        call()
        times.append(time.thread_time() - begin)
    torch.cuda.synchronize()
    return min(times)


def launches(call: Callable[[], object]) -> dict[str, Any]:
    """`launches` (kernels), `device_copies` (copies and fills) and `kernel_time_s` (sum over kernels, warm caches)."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        return count_events(json.loads(file.read_text(errors="replace"))["traceEvents"])


def count_events(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The same from the events of a trace in Chrome's format (durations in microseconds)."""
    categories = [(event.get("cat"), float(event.get("dur", 0.0))) for event in events]
    kernels = [duration for category, duration in categories if category == "kernel"]
    copies = [category for category, _ in categories if category in ("gpu_memcpy", "gpu_memset")]
    return {
        "launches": len(kernels),
        "device_copies": len(copies),
        "kernel_time_s": sum(kernels) * 1e-6,
    }


def graph_time(
    call: Callable[[], object],
    flush: Callable[[], None],
    after_capture: Callable[[], object] = lambda: None,
    base: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """`gpu_time_s`: seconds of `call` less those of `base` on the GPU, from CUDA graphs with a cold L2 cache.

    A graph of GRAPH_CALLS times (flush, call) less one of as many (flush, base); median of GRAPH_REPLAYS pairs of
    replays. A backward pass is a call of both passes whose base is the forward pass.
    `after_capture` is called before the first replay. `gpu_time_missing` instead, with the reason, where the call
    cannot be captured.
    """
    try:
        both, alone = _captured(call, flush), _captured(base, flush)
        after_capture()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return {"gpu_time_missing": f"not capturable: {str(error).splitlines()[0]}"}
    differences = []
    for index in range(GRAPH_REPLAYS + 3):
        seconds = _replay(both) - _replay(alone)
        if index >= 3:
            differences.append(seconds / GRAPH_CALLS)
    return {"gpu_time_s": statistics.median(differences)}


def _captured(call: Callable[[], object], flush: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            flush()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            flush()
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3
