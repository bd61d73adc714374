"""A user's DeepSpeed JSON under ours: merged, and refused where the two contradict.

DeepSpeed ignores unknown top-level keys silently (`zero_optimisation` leaves ZeRO at 0), so they are refused here.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

# Keys that our configuration decides -> the key to change instead.
OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.clip",
    "zero_optimization.stage": "engine.zero",
    "bf16.enabled": "engine.precision",
}
# Sections of DeepSpeed's own that none of its constants names.
SECTIONS = {
    "activation_checkpointing",
    "aio",
    "autotuning",
    "bf16",
    "comet",
    "comms_logger",
    "compile",
    "compression_training",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "elasticity",
    "flops_profiler",
    "hybrid_engine",
    "nebula",
    "pipeline",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "wandb",
    "zero_optimization",
}
REFUSED = {
    "optimizer": "the optimizer is set in the section optim",
    "scheduler": "the learning rate is set in the section optim",
    "fp16": "training in fp16 is not offered; use engine.precision=bf16",
    "amp": "apex amp is not offered; use engine.precision=bf16",
}


def merged_with(json_file: str | None, ours: dict[str, Any]) -> dict[str, Any]:
    """Our settings over those of `json_file`. Raises ValueError with the key and the cure."""
    if json_file is None:
        return ours
    try:
        theirs = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"engine.json_file: cannot read {json_file}: {error}") from error
    if not isinstance(theirs, dict):
        raise ValueError(f"engine.json_file: {json_file} must hold one JSON object")
    known = known_keys()
    for key in theirs:
        if key in REFUSED and theirs[key] not in (None, {}, {"enabled": False}):
            raise ValueError(f"{json_file}: remove the key {key}: {REFUSED[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{json_file}: DeepSpeed knows no key {key!r}{hint}")
    for path, cure in OURS.items():
        given, decided = _at(theirs, path), _at(ours, path)
        if given not in (None, "auto") and given != decided:
            raise ValueError(
                f"{json_file} says {path} = {given}, the configuration gives {decided}; "
                f"change {cure} or remove the key from the JSON"
            )
    return _merge(theirs, ours)


def known_keys() -> set[str]:
    """The top-level keys that DeepSpeed reads: its string constants."""
    from deepspeed.runtime import config as runtime_config
    from deepspeed.runtime import constants

    words = {
        value
        for module in (constants, runtime_config)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    return words | SECTIONS


def _at(tree: dict[str, Any], path: str) -> Any:
    node: Any = tree
    for part in path.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
