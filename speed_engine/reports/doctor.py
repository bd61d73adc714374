"""`python -m speed_engine doctor`: what is installed, which kernel will run where, and why.

What needs no torch is looked up and shown first: torch takes a second to import, and where it cannot be imported, the
versions of what stands beside it are the first thing to know.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from speed_engine.progress import wrapped

ATTENTION_HEAD = 72  # the head size of DiT-XL/2
PACKAGES = ("torch", "triton", "deepspeed", "xformers", "webdataset", "diffusers", "safetensors")
# What is needed for one thing alone: package -> the thing.
OPTIONAL = {
    "torch-fidelity": "score with Inception features",
    "torchvision": "the same; must fit torch's version",
    "tensorboard": "log.tensorboard=true",
    "wandb": "log.wandb=true",
    "scikit-learn": "the digits",
    "transformers": "prompts: encode --text-encoder, sample --prompt",
    "pyarrow": "encode --images of Hugging Face tables",
    "s3fs": "data.path=s3://...",
}


def installed() -> dict[str, Any]:
    """What is here, without torch; JSON-able."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES} | {"apex": _apex()},
        "optional": {name: _version(name) for name in OPTIONAL},
        "hub_cache": str(_hub_cache()),
        "hub_cache_bytes": _size(_hub_cache()),
        "disk_free_bytes": shutil.disk_usage(".").free,
    }


def seen_by_torch() -> dict[str, Any]:
    """Devices, and which kernel runs on each; JSON-able. Raises ValueError where torch cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it loads
        raise ValueError(
            f"torch {_version('torch')} cannot be imported: {error}; reinstall it"
        ) from error
    from speed_kernels import build, contract
    from speed_kernels.attention.op import choose_attention

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    kernels = []
    for device in devices:
        choices = [contract.choose(op, device) for op in contract.ops() if contract.backends(op)]
        choices.append(choose_attention(device, head_dim=ATTENTION_HEAD))
        kernels += [
            {"op": each.op, "device": device, "backend": each.backend, "reason": each.reason}
            for each in choices
        ]
    return {
        "nccl": _nccl(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": {"isa": build.isa(), "threads": torch.get_num_threads()},
        "compiler": _compiler(),
        "kernel_cache": str(build.cache_folder()),
        "kernel_cache_bytes": _size(build.cache_folder()),
        "kernels": kernels,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nccl() -> str:
    import torch

    if not torch.distributed.is_nccl_available():
        return "not in this build of torch"
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetched, as it decides by its variables."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def _size(folder: Path) -> int:
    """Bytes of all files below; 0 where there is no such folder. Links are not followed."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _apex() -> str:
    """NVIDIA's apex has `apex.optimizers`; the `apex` of PyPI is another project."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "PyPI's `apex`, which is not NVIDIA's: pip uninstall apex"
    return "NVIDIA apex"


def _compiler() -> str:
    from speed_kernels import build

    try:
        return build.compiler()[1]
    except build.BuildError as error:
        return str(error)


def run(as_json: bool) -> int:
    """Print the examination, each part as soon as it is known. Raises ValueError where torch cannot be imported."""
    here = installed()
    if as_json:
        print(json.dumps(here | seen_by_torch(), indent=1))
        return 0
    print(f"python         {here['python']}")
    for name, version in here["packages"].items():
        print(f"{name:14} {version}")
    for name, version in here["optional"].items():
        print(f"{name:14} {version:14} for {OPTIONAL[name]}")
    print(f"disk           {here['disk_free_bytes'] / 2**30:.1f} GiB free here")
    print(
        f"hub_cache      {here['hub_cache']} ({here['hub_cache_bytes'] / 2**20:.1f} MiB)",
        flush=True,
    )
    facts = seen_by_torch()
    from speed_engine.reports.plan_cost import FP32_ON_GPU  # imports torch

    print(f"kernel_cache   {facts['kernel_cache']} ({facts['kernel_cache_bytes'] / 2**20:.1f} MiB)")
    print(f"NCCL           {facts['nccl']}")
    print(f"GPUs           {', '.join(facts['gpus']) or 'none'}")
    print(wrapped(f"precision      {FP32_ON_GPU}", " " * 15))
    print(f"CPU            {facts['cpu']['isa']}, {facts['cpu']['threads']} threads")
    print(wrapped(f"compiler       {facts['compiler']}"))
    for kernel in facts["kernels"]:
        where = f"{kernel['op']} on {kernel['device']}: {kernel['backend']}"
        print(wrapped(f"kernel         {where} ({kernel['reason']})"))
    return 0
