"""FlashAttention 3 and 4, where their packages are installed, in the place of torch's flash kernel (FlashAttention 2).

Nothing here depends on the packages: torch knows how to put them behind its own operator
(`torch.nn.attention.activate_flash_attention_impl`), so torch.compile sees what it knows. What is behind that operator
is one thing for the whole process: the last one activated serves every model in it. All of them are exact attention; a
model that shares the process with another one may run slower than was measured, not differently.

Heads of 72 elements: FlashAttention 3 works on tiles of 96, FlashAttention 4 on tiles of 80.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import attention

from speed_kernels.attention.interface import Backend, Case, no_gpu, unfit
from speed_kernels.attention.sdpa import attend_flash

TORCHS_OWN = "FA2"
# Name in torch -> (the module that torch imports, where it comes from).
PACKAGES = {
    "FA3": ("flash_attn_interface", "build the folder hopper of Dao-AILab/flash-attention"),
    "FA4": ("flash_attn.cute.interface", "pip install --pre flash-attn-4"),
}


def unavailable(flash: str) -> str | None:
    """Why "FA3" or "FA4" cannot be used on this machine, or None. Imports the package to know it."""
    if why_not := no_gpu(flash):
        return why_not
    known = attention.list_flash_attention_impls()
    if flash not in known or not hasattr(attention, "restore_flash_attention_impl"):
        return f"torch {torch.__version__} has no place for {flash}; a newer torch does"
    module, cure = PACKAGES[flash]
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a package that was built for something else raises
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module + ".").startswith(missing + "."):
            return f"{module} is not installed; {cure}"
        return f"{module} is installed but cannot be imported: {error}"
    return None


def _unsupported_3(case: Case) -> str | None:
    return unfit(case, "FA3", majors=(9,), largest=256)


def _unsupported_4(case: Case) -> str | None:
    device = case.device
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10
    return unfit(case, "FA4", majors=(9, 10), largest=128 if blackwell else 256)


def activate(flash: str | None) -> None:
    """Put "FA2" (torch's own), "FA3" or "FA4" behind torch's flash operator, for the process; None leaves it.

    Raises what the package or torch raise where that fails.
    """
    current = attention.current_flash_attention_impl() or TORCHS_OWN
    if flash is None or flash == current:
        return
    with torch.device(
        "cpu"
    ):  # a package that makes tensors when imported shall not make them on `meta`
        if flash == TORCHS_OWN:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(flash)


@contextlib.contextmanager
def serving(flash: str | None) -> Iterator[None]:
    """`activate(flash)`, and back to what was there before."""
    before = attention.current_flash_attention_impl() or TORCHS_OWN
    try:
        activate(flash)
        yield
    finally:
        activate(before)


FLASH_3 = Backend(attend_flash, partial(unavailable, "FA3"), _unsupported_3, flash="FA3")
FLASH_4 = Backend(attend_flash, partial(unavailable, "FA4"), _unsupported_4, flash="FA4")
