"""Making a network: laid out without memory, given memory on its device, and initialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import nn


class Initialised(Protocol):
    """A network that draws its own first weights."""

    def initialise(self, seed: int) -> None: ...

    def to_empty(self, *, device: torch.device | str) -> nn.Module: ...


Network = TypeVar("Network", bound=Initialised)


def initialised(make: Callable[[], Network], seed: int, device: torch.device | str) -> Network:
    """The network that `make` lays out, on `device`; on the `meta` device nothing is allocated."""
    with torch.device("meta"):  # no memory, no default initialisation
        network = make()
    if torch.device(device).type != "meta":
        network.to_empty(device=device)
        network.initialise(seed)
    return network
