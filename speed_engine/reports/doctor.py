"""`python -m speed_engine doctor`: what is installed, which kernel will run where, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from typing import Any

import torch

ATTENTION_HEAD = 72  # the head size of DiT-XL/2
PACKAGES = ("torch", "triton", "deepspeed", "xformers", "webdataset", "diffusers", "safetensors")


def examine() -> dict[str, Any]:
    """Everything the doctor knows, as one JSON-able mapping."""
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
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES} | {"apex": _apex()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": {"isa": build.isa(), "threads": torch.get_num_threads()},
        "compiler": _compiler(),
        "kernel_cache": str(build.cache_folder()),
        "kernels": kernels,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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
    """Print the examination."""
    facts = examine()
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"python       {facts['python']}")
    for name, version in facts["packages"].items():
        print(f"{name:12} {version}")
    print(f"GPUs         {', '.join(facts['gpus']) or 'none'}")
    print(f"CPU          {facts['cpu']['isa']}, {facts['cpu']['threads']} threads")
    print(f"compiler     {facts['compiler']}")
    for kernel in facts["kernels"]:
        print(
            f"kernel       {kernel['op']} on {kernel['device']}: "
            f"{kernel['backend']} ({kernel['reason']})"
        )
    return 0
