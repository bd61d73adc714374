"""When an op may go to its kernel directly, past torch's dispatcher, which costs more than a launch.

Every op is a torch custom op for whoever traces, transforms or watches it; a plain eager call needs none of that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def direct(tensor: Tensor) -> bool:
    """Whether a call with `tensor` is plain eager work: nothing traces or transforms it, no mode and no profiler looks
    on (a profiler is to see the op's name), and the tensor has memory of its own."""
    return (
        type(tensor) in _PLAIN
        and not tensor.is_meta
        and not torch.compiler.is_compiling()
        and not torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


class DirectFunction(torch.autograd.Function):
    """An autograd function for calls that `direct` has let through: it does not look for the transforms and the dead
    wrappers again that torch's own `apply` looks for at every call."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super(torch.autograd.Function, cls).apply(*args)  # pyright: ignore
