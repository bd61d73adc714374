"""The processes of a run: who this one is, on which device, and how all of them agree.

Two channels: the training engine's own (NCCL on GPUs), and a gloo group on the host for decisions (stop, errors,
barriers), which never makes the GPU wait.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from speed_engine.distributed.launched import Place, place
from speed_engine.errors import SaidElsewhere

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=30)  # the first step compiles kernels and may load large files
# Seconds until all are there: between the first and the last lies a start of Python.
MEETING = 300.0


@dataclass
class Waiting:
    """Since when (`time.monotonic`) a process waits for the others in an agreement; None: it does not."""

    since: float | None = None


@dataclass(frozen=True)
class Processes:
    """This process's place among all of them. waiting: may be read by another thread."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    host_group: Any = field(default=None, repr=False)
    waiting: Waiting = field(default_factory=Waiting, repr=False, compare=False)

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """What is inside depends on the others, and on nothing that may be slow beside them."""
        self.waiting.since = time.monotonic()
        try:
            yield
        finally:
            self.waiting.since = None

    @property
    def first(self) -> bool:
        """True on the one process that writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            with self.waits():
                dist.barrier(group=self.host_group)

    def any(self, flag: bool) -> bool:
        """True on all processes if it is true on one. Host only; does not touch the device."""
        if self.world == 1:
            return flag
        tensor = torch.tensor([int(flag)])
        with self.waits():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(tensor.item())

    def end_together(self, failure: BaseException | None) -> None:
        """Raise on every process if one brings a failure, so that none waits for ever for one that has left.

        The lowest of those that failed raises its own, the others SaidElsewhere: one sentence in all. Host only.
        """
        if self.world > 1:
            lowest = torch.tensor([self.rank if failure is not None else self.world])
            with self.waits():
                dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=self.host_group)
            if int(lowest) not in (self.rank, self.world):
                raise SaidElsewhere(f"process {int(lowest)} failed") from failure
        if failure is not None:
            raise failure

    def attempt(self, action: Callable[[], T]) -> T:
        """What `action` returns, if it fails on no process; it must not be collective itself."""
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        self.end_together(failure)
        return result  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """The first process's value, on all of them; anything that can be pickled."""
        if self.world == 1:
            return value
        values = [value]
        with self.waits():
            dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def on_another_channel(self) -> Processes:
        """The same processes with a group of its own, for another thread. Collective."""
        if self.world == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return replace(self, host_group=group, waiting=Waiting())

    def largest_later(self, value: int) -> Callable[[], int]:
        """Begin to find the largest `value` of all processes; the function returned waits for it.

        Host only. Every process must begin, and none may leave before it has waited.
        """
        if self.world == 1:
            return lambda: value
        tensor = torch.tensor([value])
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True)

        def wait() -> int:
            assert work is not None
            with self.waits():
                work.wait()
            return int(tensor)

        return wait

    def largest(self, value: float) -> float:
        """The largest `value` of all processes. Host only."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        with self.waits():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host_group)
        return float(tensor)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of a small host tensor over all processes."""
        if self.world > 1:
            with self.waits():
                dist.all_reduce(tensor, group=self.host_group)
        return tensor

    def assert_equal(self, tensors: dict[str, torch.Tensor], what: str) -> None:
        """Raise RuntimeError on every process unless all hold the same bits in these host tensors."""
        digest = 0
        for name in sorted(tensors):
            raw = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
            digest = zlib.crc32(raw.numpy().tobytes(), digest)
        # A mean that equals everybody's own number: all numbers are equal.
        mean = self.sum(torch.tensor(digest, dtype=torch.float64)).item() / self.world
        if self.any(mean != digest):
            raise RuntimeError(f"{what} differs between processes: a bug in a time-step method")

    def broadcast(self) -> Callable[[torch.Tensor], object] | None:
        """The first process's tensor to all, in place, on the training device; None for one process alone."""
        return None if self.world == 1 else functools.partial(dist.broadcast, src=0)

    def all_reduce(self) -> Callable[[torch.Tensor], object] | None:
        """A sum over all processes, in place, on the training device; None for one process alone."""
        return None if self.world == 1 else dist.all_reduce


class NotMet(RuntimeError):
    """Another process has not come, or has gone before all had met."""


def start(device: str, meeting: float = MEETING) -> Processes:
    """Join the other processes. `device`: auto, cpu or cuda. Raises ValueError if it is not there.

    meeting: seconds to wait for all others; NotMet names those that have not come by then.
    The launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; or SLURM's) is used where it
    is set, and refused where only a part of it is; without it this is a run of one process, which needs no port.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device=cuda, but torch sees no CUDA device; use engine.device=cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    told = place(os.environ)
    rank, world, local_rank = (told.rank, told.world, told.local_rank) if told else (0, 1, 0)
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU of its own: torch sees "
                f"{torch.cuda.device_count()}; start fewer processes"
            )
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:  # processes of one machine share its cores
        neighbours = told.neighbours if told else 1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // neighbours))
    if not dist.is_initialized():
        _join("nccl" if use_cuda else "gloo", told, datetime.timedelta(seconds=meeting))
    if (dist.get_rank(), dist.get_world_size()) != (rank, world):
        raise ValueError(
            f"this is process {rank} of {world} by the environment, but process {dist.get_rank()} of "
            f"{dist.get_world_size()} in torch's process group; start them by one launcher"
        )
    host_group = dist.new_group(backend="gloo", timeout=TIMEOUT) if use_cuda else dist.group.WORLD
    name = f"cuda:{local_rank}" if use_cuda else "cpu"
    return Processes(rank, world, local_rank, torch.device(name), host_group)


def _join(backend: str, told: Place | None, meeting: datetime.timedelta) -> None:
    """Form the group. Raises ValueError where the first process's port is taken or out of reach, or NotMet."""
    if told is None:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=0, world_size=1)
        return
    store = _met(told, meeting)
    # What is left to connect is a matter of milliseconds: as short a patience, and the long one afterwards.
    dist.init_process_group(
        backend, timeout=meeting, store=store, rank=told.rank, world_size=told.world
    )
    for patient in (store, dist.group.WORLD):
        patient.set_timeout(TIMEOUT)  # type: ignore[union-attr]


def _met(told: Place, meeting: datetime.timedelta) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """The store of the first process, or of torchrun, once all have left word there."""
    hosts = told.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"port {told.port} of {told.address}, where the processes meet"
    place = (told.address, told.port, told.world)
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            *place, is_master=hosts, timeout=meeting, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        raise ValueError(
            f"cannot {'open' if hosts else 'reach'} {where}: {' '.join(str(error).split())[:200]}; "
            f"if another run holds it, choose another: deepspeed --master_port {told.port % 65535 + 1} "
            "... (torchrun --master-port)"
        ) from error
    words = [f"speed_engine/came/{rank}" for rank in range(told.world)]
    try:
        store.set(words[told.rank], "")
        with contextlib.suppress(dist.DistStoreError):
            store.wait(words, meeting)
            return store
        absent = [rank for rank, word in enumerate(words) if not store.check([word])]
    except dist.DistNetworkError as error:
        raise NotMet(f"the process that held {where}, has gone before all had come") from error
    some = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
    raise NotMet(
        f"of {told.world} processes these have not come to {where}, within "
        f"{meeting.total_seconds():g} s: {some}; look for what they said"
    )


def lost_connection(error: BaseException) -> bool:
    """Whether `error` is what gloo or NCCL say when another process has gone, or NotMet."""
    if isinstance(error, (dist.DistError, NotMet)):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def stop(together: bool) -> None:
    """Leave the group. `together`: wait for the others first, so that none finds its peers gone."""
    if dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()
