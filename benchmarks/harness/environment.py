"""What a number depends on besides the code: versions, processor, GPU, commit. No host, user or folder names."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Of the environment: what changes the speed of a CPU.
SPEED_VARIABLES = (
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
    "LD_PRELOAD",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "THP_MEM_ALLOC_ENABLE",
)
ROOT = Path(__file__).resolve().parents[2]


def conditions(device: torch.device) -> dict[str, Any]:
    """Columns that all rows of a run share."""
    commit, dirty = git_state()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "compiler": compiler(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "commit": commit,
        "dirty": dirty,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = driver()
    return found


def environment() -> str:
    """The variables that are set, as `NAME=value`, with the names alone of files; `default` if none is."""
    found = {name: os.environ[name] for name in SPEED_VARIABLES if name in os.environ}
    return ", ".join(f"{name}={Path(value).name}" for name, value in found.items()) or "default"


def version(package: str) -> str:
    """Installed version of a distribution, or `none`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def compiler() -> str:
    """Version line of the compiler that builds the C++ kernels, or `none`."""
    from speed_kernels import build

    try:
        return build.compiler()[1]
    except build.BuildError:
        return "none"


def cpu_name() -> str:
    """The processor's name and its widest instruction set that torch uses."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def driver() -> str:
    """Version of the GPU's driver, or `unknown`."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 else "unknown"


def git_state() -> tuple[str, bool | None]:
    """(commit, whether tracked files differ from it); (`unknown`, None) outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "unknown", None
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    answer = subprocess.run([program, "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None
