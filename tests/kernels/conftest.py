"""Kernel tests run with poisoned memory: what a kernel forgets to write is not a number, and shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from speed_kernels import build
from torch.utils._device import _device_constructors

INSTRUCTION_SETS = ["DEFAULT", "AVX2", "AVX512"]  # each runs wherever the next one does


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.fill_(float("nan"))
        if tensor.dtype in (torch.int16, torch.int32, torch.int64):
            return tensor.fill_(torch.iinfo(tensor.dtype).min // 3)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory of torch.empty, torch.empty_like and Tensor.new_empty."""
    # `with torch.device(...)` keeps a list, made when it is first used, of the functions that it takes over: ours must
    # not be in it, or the true ones would ignore the device for the rest of the process.
    _device_constructors()
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set of the C++ kernels that this processor has."""
    if INSTRUCTION_SETS.index(request.param) > INSTRUCTION_SETS.index(build.isa()):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture
def on_threads() -> Iterator[Callable[[Callable[[], Any]], list[Any]]]:
    """Calls a function with 1, 2 and 5 threads: its three results."""
    before = torch.get_num_threads()

    def results(function: Callable[[], Any]) -> list[Any]:
        found = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(function())
        return found

    yield results
    torch.set_num_threads(before)
