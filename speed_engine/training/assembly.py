"""From a configuration to the parts of a run, and the manifest that records what was decided."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from speed_kernels.attention.op import BACKENDS
from speed_kernels.contract import BackendError, Choice, choose

from speed_engine.config import RunConfig
from speed_engine.data.loader import Feed
from speed_engine.distributed import Processes
from speed_engine.kinds import find as kind_module
from speed_engine.step_table import StepTable, build_step_table

OPS = ("noise", "loss", "adamw_ema")  # of every training step
AS_BEFORE = "as before the interruption: "
# What may differ between a run and its continuation; everything else changes the result.
FREE_TO_CHANGE = {"name", "run_dir", "log", "checkpoint", "kernels"}


def split_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """(micro batch, accumulation) of each process: global batch = micro batch x accumulation x world.

    Raises ValueError if it does not divide.
    """
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % world:
        raise ValueError(
            f"train.global_batch={batch} does not divide over {world} processes; "
            f"choose a multiple of {world}"
        )
    share = batch // world
    if micro is None:
        return share, 1
    if share % micro:
        raise ValueError(
            f"train.global_batch={batch} is not micro_batch x accumulation x processes for "
            f"train.micro_batch={micro} and {world} processes; choose a divisor of {share}"
        )
    return micro, share // micro


def build_source(config: RunConfig) -> Any:
    """The data. Raises ValueError (DataError) naming the file and the cure."""
    return kind_module("data", config.data.kind).build(config.data)


def build_table(config: RunConfig) -> StepTable:
    """The step table, on the host."""
    return build_step_table(
        config.schedule, config.objective, config.timesteps, config.learned_variance
    )


def model_facts(config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
    """What a model is told of the data. Raises ValueError for images that are not square."""
    channels, height, width = shape
    if height != width:
        raise ValueError(f"data: images of {height}x{width} are not square; encode them square")
    return {
        "channels": channels,
        "sample_size": height,
        "num_classes": num_classes,
        "learned_variance": config.learned_variance,
    }


def choose_kernels(config: RunConfig, device: torch.device) -> list[Choice]:
    """The backend of every op of a training step, the network's own ops included.

    Raises speed_kernels.contract.BackendError where one that was asked for cannot run.
    """
    ops = OPS + getattr(kind_module("model", config.model.kind), "KERNELS", ())
    kernels = config.kernels
    return [choose(op, device, kernels.backend, kernels.strict) for op in ops]


def build_model(
    config: RunConfig,
    shape: tuple[int, int, int],
    num_classes: int,
    device: torch.device | str = "cpu",
    backends: dict[str, str] | None = None,
) -> Any:
    """The freshly initialised network; on the device `meta` it takes no memory.

    backends: op -> backend for the network's fused kernels; None: plain torch.
    """
    module = kind_module("model", config.model.kind)
    facts = model_facts(config, shape, num_classes)
    precision = getattr(config.engine, "precision", "fp32")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    options = {"seed": config.seed, "device": device, "dtype": dtype, "backends": backends}
    return module.build(config.model, **facts, **options)


def agree_on_attention(model: Any, processes: Processes) -> None:
    """All processes use what the first one measured to be fastest. Collective."""
    choice: Choice | None = getattr(model, "attention_choice", None)
    if choice is None:  # a network without attention
        return
    words = list(BACKENDS)
    mine = float(words.index(choice.backend)) if processes.first else 0.0
    word = words[int(processes.sum(torch.tensor(mine, dtype=torch.float64)).item())]
    if word != choice.backend:
        model.attend_by(word)


def keep_attention(
    model: Any, processes: Processes, before: dict[str, Any], now: dict[str, Any]
) -> str | None:
    """Attend as before the interruption: a second measurement may prefer another kernel, with other last bits.

    before, now: the manifests of the checkpoint and of this run. Another device, or a kernel that was asked for by
    name, changes nothing. Collective. Returns one sentence where the earlier kernel cannot run any more.
    """
    earlier: dict[str, Any] | None = before.get("attention")
    chosen: Choice | None = getattr(model, "attention_choice", None)
    if earlier is None or chosen is None or chosen.backend == earlier["backend"]:
        return None
    if now["config"]["model"]["attention"] != "auto" or before.get("device") != now["device"]:
        return None
    word, why_not = earlier["backend"], None
    try:
        model.attend_by(word)
    except BackendError as error:
        why_not = str(error)
    if processes.any(why_not is not None):
        model.attend_by(chosen.backend)
        model.attention_choice = chosen
        return (
            f"attention was computed by {word} before, and is by {chosen.backend} from here on: "
            f"{why_not or 'another process cannot'}"
        )
    reason = AS_BEFORE + earlier["reason"].removeprefix(AS_BEFORE)
    model.attention_choice = dataclasses.replace(model.attention_choice, reason=reason)
    return None


def build_feed(
    config: RunConfig, source: Any, model: Any, processes: Processes, backend: str
) -> Feed:
    """The batches of this process. `backend` of the op `noise`, whose words flip and drop labels."""
    train = config.train
    micro_batch, _ = split_batch(config, processes.world)
    return Feed(
        source,
        config.seed,
        train.global_batch,
        micro_batch,
        model.null_label,
        config.model.label_dropout,
        train.flip,
        processes,
        backend,
    )


def open_engine(config: RunConfig, model: Any, processes: Processes, backend: str) -> Any:
    """The engine around `model`. `backend` of the op `adamw_ema`. Collective."""
    micro_batch, accumulation = split_batch(config, processes.world)
    return kind_module("engine", config.engine.kind).open_engine(
        config.engine,
        model,
        config.optim,
        processes,
        micro_batch=micro_batch,
        accumulation=accumulation,
        backend=backend,
    )


def macs_per_sample(config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> int:
    """Multiply-adds of one forward pass of one sample."""
    module = kind_module("model", config.model.kind)
    return module.macs_per_sample(config.model, **model_facts(config, shape, num_classes))


def describe(
    config: RunConfig,
    processes: Processes,
    source: Any,
    model: Any,
    choices: list[Choice],
    engine_facts: dict[str, Any],
) -> dict[str, Any]:
    """The run's manifest: everything that was decided, JSON-able."""
    if processes.device.type == "cuda":
        device = torch.cuda.get_device_name(processes.device)
    else:
        device = f"{platform.machine()} CPU"
    return {
        "config": config.model_dump(mode="json"),
        "data": {
            "shape": list(source.shape),
            "num_classes": source.num_classes,
            "num_samples": len(source),
            "fingerprint": source.fingerprint,
            "space": source.kind,
            "scale": source.index.scale,
            "shift": source.index.shift,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "kernels": [dataclasses.asdict(choice) for choice in choices],
        "attention": attention_facts(model),
        "processes": processes.world,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **engine_facts,
    }


def attention_facts(model: Any) -> dict[str, Any] | None:
    """Which implementation of attention runs and why; None for a network without attention."""
    choice: Choice | None = getattr(model, "attention_choice", None)
    return None if choice is None else dataclasses.asdict(choice)


def run_folder(config: RunConfig, fingerprint: str, world: int) -> Path:
    """Where the run writes: `run_dir`, or runs/NAME-HASH with the hash of what a resume compares."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    decided = {
        "config": config.model_dump(mode="json"),
        "data": {"fingerprint": fingerprint},
        "processes": world,
    }
    text = json.dumps(comparable(decided), sort_keys=True)
    return Path("runs") / f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def comparable(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that must be equal for a resume to continue the same run."""
    config = {k: v for k, v in manifest["config"].items() if k not in FREE_TO_CHANGE}
    config["train"] = {k: v for k, v in config["train"].items() if k != "steps"}
    config["data"] = manifest["data"]["fingerprint"]  # wherever the files are now
    result = {"config": config}
    if manifest["config"]["engine"]["kind"] == "deepspeed":  # ZeRO's shards fit one world size
        result["processes"] = manifest["processes"]
    return result
