"""A stand-in for Triton's CUDA driver, for a machine without a GPU: `install` it in a process of its own.

Kernels are specialised, compiled by the real assembler and "loaded"; launches are noted and not done, so that results
mean nothing. Tensors are on the CPU. `RECORD` holds what happened; with `RECORD.capturing` the process believes that
every launch goes into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from speed_kernels import contract, launch

ARCH = 90
PROPERTIES = {
    "max_shared_mem": 232448,
    "multiprocessor_count": 132,
    "max_num_regs": 65536,
    "warpSize": 32,
    "sm_clock_rate": 1,
    "mem_clock_rate": 1,
    "mem_bus_width": 1,
}


@dataclass
class Record:
    """loaded: (kernel, whether a capture was under way). launched: (kernel, programs, the same)."""

    capturing: bool = False
    loaded: list[tuple[str, bool]] = field(default_factory=list)
    launched: list[tuple[str, int, bool]] = field(default_factory=list)


RECORD = Record()


class _Utils:
    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        RECORD.loaded.append((name, RECORD.capturing))
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
        RECORD.launched.append((self.name, x * y * z, RECORD.capturing))


class _Driver:
    def __init__(self) -> None:
        self.utils, self.launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

        return GPUTarget("cuda", ARCH, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_device_interface(self) -> Any:
        return torch.cuda


def install() -> None:
    """From now on Triton kernels take CPU tensors and do nothing, and every op chooses them."""
    from triton.runtime.driver import driver  # pyright: ignore[reportMissingImports]

    driver.set_active(_Driver())
    launch.capturing = lambda device: RECORD.capturing
    launch.unavailable = lambda: None
    contract.PREFERRED = {"cpu": ("triton",)}
    original = contract.unavailable
    contract.unavailable = lambda op, backend, device: (
        None if backend == "triton" else original(op, backend, device)
    )
