"""Making a network: laid out on its device, in memory that holds nothing yet, and initialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class Initialised(Protocol):
    """A network that draws its own first weights."""

    def initialise(self, seed: int) -> None: ...


Network = TypeVar("Network", bound=Initialised)


class _Undrawn(TorchFunctionMode):
    """Leaves out torch's own first weights, which nobody reads; without memory they would come from formulas of its
    compiler, whose import alone takes two seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def initialised(make: Callable[[], Network], seed: int, device: torch.device | str) -> Network:
    """The network that `make` lays out, on `device`; on the `meta` device nothing is allocated."""
    with torch.device(device), _Undrawn():
        network = make()
    if torch.device(device).type != "meta":
        network.initialise(seed)
    return network
