"""Kernel tests run with poisoned memory: what a kernel forgets to write is not a number, and shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


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
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
