"""A whole training step as one CUDA graph: the host starts one thing a step instead of thousands.

A graph replays the same kernels on the same addresses. Inputs are therefore copied into tensors that stay, outputs
lie in tensors that the next step overwrites, and every number that varies must be in device memory: the step's address
is an input, the learning rate is in AdamWEMA's tensor of numbers, all counters are on the device.

Whatever cannot be captured is refused, in one sentence, when the engine is made; nothing is captured twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP = 3  # eager steps before the capture: kernels are compiled, states and workspaces are made


def refuse_what_cannot_be_captured(
    device: torch.device, world: int, accumulation: int, optimizer: str, compiled: bool
) -> None:
    """Raise ValueError, with the cure, where a whole step cannot be one CUDA graph.

    optimizer: `optim.name`; compiled: whether torch.compile is used.
    """
    off = "engine.cuda_graph=false"
    if device.type != "cuda":
        raise ValueError(
            f"engine.cuda_graph=true needs a CUDA device, and this run is on {device.type}; set {off}"
        )
    if world > 1:
        raise ValueError(
            f"engine.cuda_graph=true captures the step of one process, and this run has {world}; set {off}"
        )
    if accumulation > 1:
        raise ValueError(
            f"engine.cuda_graph=true captures one micro-batch and its update, and this run has {accumulation} "
            f"micro-batches an update; leave train.micro_batch out, or set {off}"
        )
    if optimizer != "adamw_ema":
        raise ValueError(
            f"engine.cuda_graph=true needs an optimizer whose counters and learning rate are on the device, and "
            f"those of optim.name={optimizer} are not; set optim.name=adamw_ema or {off}"
        )
    if compiled and _inductor_makes_graphs():
        raise ValueError(
            f"engine.cuda_graph=true captures what torch.compile makes, but torch._inductor.config.triton.cudagraphs "
            f"is set and makes graphs of its own; unset TORCHINDUCTOR_CUDAGRAPHS, or set {off}"
        )


def _inductor_makes_graphs() -> bool:
    import torch._inductor.config as inductor

    return bool(inductor.triton.cudagraphs)


class Recorder(Protocol):
    """How work gets into a graph. CUDA's is `CudaRecorder`."""

    def eagerly(self, work: Callable[[], Any]) -> Any:
        """Run `work` now, as it should run before a capture."""
        ...

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """(the tensors that hold what `work` returns, the function that does the work). Does not do it."""
        ...


class CudaRecorder:
    """torch's recipe for whole networks: warm up on a side stream, capture from a pool of private memory."""

    def __init__(self, device: torch.device) -> None:
        self.side = torch.cuda.Stream(device)

    def eagerly(self, work: Callable[[], Any]) -> Any:
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            result = work()
        main.wait_stream(self.side)
        return result

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        try:
            # The thread that reads the next batches pins and allocates memory meanwhile, which the mode `global`
            # would forbid.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken capture raises, too
            raise ValueError(
                f"engine.cuda_graph=true, but this step cannot be captured ({str(cause).splitlines()[0]}); "
                "set engine.cuda_graph=false"
            ) from error
        return result, graph.replay


class CapturedStep:
    """Calls `work(inputs)`: `WARM_UP` times as it is, then captured once and replayed for ever.

    Every call does the work once, on the inputs given: the eager calls are training steps, too. `inputs` are tensors
    by name, the same names, shapes, dtypes and devices at each call. What is returned is overwritten by the next call.
    `work` may change tensors in place, but nothing on the host that matters at a replay, and it must leave gradients
    None, so that the captured backward pass allocates them from the graph's memory. `before_replays` is called once,
    when the capture has ended: it writes to the device what the graph reads there and only the capture could tell.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        recorder: Recorder,
        before_replays: Callable[[], object] = lambda: None,
    ) -> None:
        self.work = work
        self.before_replays = before_replays
        self.recorder = recorder
        self.calls = 0
        self.replay: Callable[[], None] | None = None
        self._inputs: dict[str, Tensor] | None = None
        self._result: Any = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Any:
        """The result of the work. Raises ValueError for inputs unlike the first call's, or a failed capture."""
        self._fill(inputs)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.recorder.eagerly(self._work)
        if self.replay is None:
            self._result, self.replay = self.recorder.record(self._work)
            self.before_replays()
        self.replay()
        return self._result

    def _work(self) -> Any:
        assert self._inputs is not None
        return self.work(self._inputs)

    def _fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy the inputs to where the graph reads them."""
        if self._inputs is None:
            self._inputs = {name: torch.empty_like(x) for name, x in inputs.items()}
        if _forms(inputs) != _forms(self._inputs):
            raise ValueError(
                f"a captured step takes inputs like those it was captured with, {_forms(self._inputs)}, "
                f"not {_forms(inputs)}; set engine.cuda_graph=false for batches that differ"
            )
        for name, x in inputs.items():
            self._inputs[name].copy_(x)


def _forms(inputs: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(x.shape), x.dtype, x.device) for name, x in inputs.items()}
