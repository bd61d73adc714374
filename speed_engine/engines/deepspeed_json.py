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
    "torch_autocast": "use engine.kind=torch engine.precision=autocast, or engine.precision=bf16",
    "bfloat16": "its name is bf16, and engine.precision decides it",
    "elasticity": "it changes the batch, which train.global_batch decides",
}
# Keys that say in which type something is computed or kept -> what they may say at all (bf16 only under
# engine.precision=bf16): gradients may be summed more precisely than they are computed.
PRECISION: dict[str, tuple[str, ...]] = {
    "data_types.grad_accum_dtype": ("fp32", "bf16"),
    "data_types.param_dtype": ("bf16",),
    "data_types.buffer_dtype": ("bf16",),
    "data_types.keep_in_fp32_modules": (),
    "bf16.bf16_master_weights_and_grads": (),
    "bf16.bf16_optimizer_states": (),
    "communication_data_type": ("fp32", "bf16"),
}
# Settings that print, measure or permit, but change no number.
SILENT = {
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "comet",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
}


def read(json_file: str) -> dict[str, Any]:
    """The user's settings, without the sections that are turned off. Raises ValueError."""
    try:
        theirs = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"engine.json_file: cannot read {json_file}: {error}") from error
    if not isinstance(theirs, dict):
        raise ValueError(f"engine.json_file: {json_file} must hold one JSON object")
    return {k: v for k, v in theirs.items() if k not in REFUSED or not _is_off(v)}


def merged_with(json_file: str | None, ours: dict[str, Any]) -> dict[str, Any]:
    """Our settings over those of `json_file`. Raises ValueError with the key and the cure."""
    if json_file is None:
        return ours
    theirs = read(json_file)
    known = known_keys()
    for key in theirs:
        if key in REFUSED:
            raise ValueError(f"{json_file}: remove the key {key}: {REFUSED[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{json_file}: DeepSpeed knows no key {key!r}{hint}")
        if isinstance(ours.get(key), dict) and not isinstance(theirs[key], dict):
            raise ValueError(f"{json_file}: the key {key} must hold an object of settings")
    for path, cure in OURS.items():
        given, decided = _at(theirs, path), _at(ours, path)
        if given not in (None, "auto") and given != decided:
            raise ValueError(
                f"{json_file} says {path} = {given}, the configuration gives {decided}; "
                f"change {cure} or remove the key from the JSON"
            )
    _refuse_another_precision(json_file, theirs, bool(_at(ours, "bf16.enabled")))
    offload = _at(theirs, "zero_optimization.offload_optimizer.device")
    if offload not in (None, "none") and theirs.get("zero_force_ds_cpu_optimizer") is not False:
        raise ValueError(
            f"{json_file} offloads the optimizer, and DeepSpeed does that for an optimizer of ours "
            'only if told so; add "zero_force_ds_cpu_optimizer": false'
        )
    return _merge(theirs, ours)


def _refuse_another_precision(json_file: str, theirs: dict[str, Any], bf16: bool) -> None:
    """engine.precision alone says what is computed and kept in which type. Raises ValueError."""
    precision = "bf16" if bf16 else "fp32"
    for path, allowed in PRECISION.items():
        given = _at(theirs, path)
        if given in (None, False, "auto", [], {}) or (
            given in allowed and (bf16 or given != "bf16")
        ):
            continue
        raise ValueError(
            f"{json_file} says {path} = {json.dumps(given)}, which is against engine.precision={precision}; "
            "remove it, or choose another engine.precision"
        )


def users_part(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of a user's settings that makes another run of it: without what our configuration gives
    in any case, and without what only prints, measures or permits."""
    rest = {
        key: {k: v for k, v in value.items() if f"{key}.{k}" not in OURS}
        if isinstance(value, dict)
        else value
        for key, value in settings.items()
        if key not in OURS and key not in SILENT and not (key in REFUSED and _is_off(value))
    }
    return {key: value for key, value in rest.items() if value not in (None, {}, "auto")}


def _is_off(section: Any) -> bool:
    """Whether a section of DeepSpeed's says that it is not used."""
    off = isinstance(section, dict) and section.get("enabled", True) in (False, "auto")
    return section in (None, {}) or off


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
