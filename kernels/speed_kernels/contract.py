"""Which backend of an op runs: decided once, with its reason, never silently.

Knows the folder layout (`speed_kernels/<op>/<file>.py`) and nothing of any op's mathematics. A backend module offers
`unavailable() -> str | None` (why it cannot run on this machine) and the op's implementation functions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

# The word in the configuration -> the file in the op's folder.
FILES = {"triton": "triton_gpu", "cpp": "cpp_cpu", "reference": "reference"}
# What `auto` tries on a device, best first.
PREFERRED = {"cuda": ("triton", "reference"), "cpu": ("cpp", "reference")}
# Element types that the backends take; the reference takes float64 as well.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend that was asked for, or required by `strict`, cannot run here."""


@dataclass(frozen=True)
class Choice:
    """The backend that one op will use, and why."""

    op: str
    backend: str
    reason: str
    fallback: bool  # a better backend exists for this device but could not be used


def ops() -> list[str]:
    """Names of all ops: the sub-folders that hold an `op.py`."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/op.py"))


def backends(op: str) -> list[str]:
    """Configuration words of the backends that exist for `op`."""
    folder = Path(__file__).parent / op
    return [word for word, file in FILES.items() if (folder / f"{file}.py").exists()]


@functools.cache  # an op asks at every call
def implementation(op: str, backend: str) -> ModuleType:
    """The module that implements `op` on `backend`. Raises BackendError where there is none."""
    if backend not in FILES or backend not in backends(op):
        raise BackendError(
            f"op {op!r} has no backend {backend!r}; it has: {', '.join(backends(op))}"
        )
    return importlib.import_module(f"speed_kernels.{op}.{FILES[backend]}")


def takes(dtype: torch.dtype, backend: str) -> bool:
    """Whether tensors of this element type can be computed by `backend`."""
    return dtype in DTYPES or (dtype == torch.float64 and backend == "reference")


def check_dtype(name: str, dtype: torch.dtype, backend: str) -> None:
    """Refuse an argument's element type that `backend` cannot take. Raises ValueError."""
    if not takes(dtype, backend):
        raise ValueError(
            f"{name} is {dtype}, which the {backend} backend cannot take; cast it to float32, bfloat16 or float16"
        )


def unavailable(op: str, backend: str, device: torch.device | str) -> str | None:
    """Why `backend` cannot run `op` on `device`, or None if it can."""
    device = torch.device(device)
    if backend == "cpp" and device.type != "cpu":
        return f"the C++ kernels run on the CPU, not on {device.type}"
    if backend == "triton" and device.type != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {device.type}"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"  # macOS and Windows have none
    return implementation(op, backend).unavailable()


def choose(
    op: str, device: torch.device | str, requested: str = "auto", strict: bool = False
) -> Choice:
    """Decide the backend of `op` on `device`.

    `requested` is `auto` or a backend's name; a backend named explicitly must be able to run. With `strict`, `auto`
    may not fall back to a slower backend than the first one that exists for the device.
    Raises BackendError with the reason.
    """
    device = torch.device(device)
    if requested != "auto":
        why_not = unavailable(op, requested, device)
        if why_not:
            raise BackendError(f"kernels.backend={requested}: {op} cannot use it: {why_not}")
        return Choice(op, requested, "asked for", False)
    existing = [word for word in PREFERRED.get(device.type, ("reference",)) if word in backends(op)]
    refusals: list[str] = []
    for backend in existing:
        why_not = unavailable(op, backend, device)
        if why_not is None:
            reason = "; ".join(refusals) if refusals else f"the fastest backend for {device.type}"
            return Choice(op, backend, reason, bool(refusals))
        refusals.append(f"{backend}: {why_not}")
        if strict:
            raise BackendError(f"kernels.strict forbids a fallback for {op}: {refusals[-1]}")
    raise BackendError(f"no backend of {op} runs on {device.type}: {'; '.join(refusals)}")


@functools.cache  # what can run does not change, and asking reads folders
def fastest(op: str, device: torch.device, requested: str = "auto") -> str:
    """The backend to run `op` with: the requested one, or the fastest that runs on `device`. Raises BackendError."""
    return requested if requested != "auto" else choose(op, device).backend
