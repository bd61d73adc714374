"""The manifest: everything that was decided for a run, and what of it must be equal for a resume."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from speed_engine.conditions import label
from speed_engine.config import KINDS, ConfigError, RunConfig, build
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.engines.deepspeed_json import read, users_part
from speed_engine.training.assembly import Parts, build_model
from speed_engine.training.attention import attention_facts
from speed_engine.weights.file import without_places

# What may differ between a run and its continuation, and why; everything else changes what is learned. DESIGN.md
# shows the same table.
MAY_CHANGE = {
    "name": "a word",
    "run_dir": "a run folder can be moved",
    "log": "only told",
    "sample": "only told",
    "checkpoint": "only kept",
    "kernels": "the same formulas, to rounding",
    "train.steps": "longer, or shorter",
    "train.micro_batch": "the same sum of gradients in other parts, to rounding",
    "train.resident": "the same samples from another place",
    "train.max_bad_steps": "when to give up",
    "train.bad_window": "when to give up",
    "train.max_bad_in_window": "when to give up",
    "train.max_rollbacks": "when to give up",
    "train.spike_sigmas": "when to go back",
    "train.spike_history": "when to go back",
    "train.replay_every": "only looked at",
    "train.stall_seconds": "how long to wait for others",
    "train.meeting_seconds": "how long to wait for others",
    "train.first_step_seconds": "how long to wait for others",
    "data": "another place or way to read; the fingerprint of what is there must be the same",
    "conditions.text.encoder": "another place of the CLIP whose empty caption the data tell",
    "model.recompute": "the same activations, computed again",
    "engine.kind": "deepspeed and torch keep the same state; the same formulas, to rounding",
    "engine.zero": "the same state in other pieces; the same sums of gradients in another order, to rounding",
    "engine.device": "the same formulas, to rounding",
    "engine.compile": "the same formulas, to rounding",
    "engine.cuda_graph": "the same kernels, launched at once",
    "processes": "the same samples, times and noise; the same sums of gradients in another order, to rounding",
}
ENGINES = ("deepspeed", "torch")  # those that keep the same state


def describe(parts: Parts, engine_facts: dict[str, Any]) -> dict[str, Any]:
    """The run's manifest, JSON-able."""
    config, facts, processes, model = parts.config, parts.facts, parts.processes, parts.model
    if processes.device.type == "cuda":
        device = torch.cuda.get_device_name(processes.device)
    else:
        device = f"{platform.machine()} CPU"
    return {
        "config": without_places(config.model_dump(mode="json")),
        "data": {
            **without_places(facts.to_json()),
            "num_samples": len(parts.source),
            "fingerprint": parts.source.fingerprint,
        },
        "validation": None
        if parts.held_out is None
        else {"samples": len(parts.held_out), "fingerprint": parts.held_out.fingerprint},
        "feed": parts.feed,
        "parameters": sum(p.numel() for p in build_model(config, facts, "meta").parameters()),
        "kernels": [dataclasses.asdict(choice) for choice in parts.choices],
        "attention": attention_facts(model),
        "processes": processes.world,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **without_places(engine_facts),
    }


def upgraded(manifest: dict[str, Any], where: Path) -> dict[str, Any]:
    """A manifest as this version writes it, from one of any version. `where`: its checkpoint.

    Places are only last names, as in a new one. Raises ValueError for one that does not hold what
    the rest of the engine reads: a damaged one of the first format, which has no hash.
    """
    try:
        manifest = _upgraded(manifest)
        places = {
            key: without_places(manifest[key])
            for key in ("config", "deepspeed_config", "deepspeed_json")
            if key in manifest
        }
        manifest = {**manifest, **places}
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"the manifest of {where} is damaged ({what}); remove that folder to use an older checkpoint"
        ) from error
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """Raise one of the errors that a missing or odd value makes, for all that reports and a resume read."""
    comparable(manifest)
    facts = Facts.from_json(manifest["data"])
    numbers = [*facts.shape, *(each.num_values + 1 for each in facts.conditions.values())]
    choices = [*manifest["kernels"], *filter(None, [manifest.get("attention")])]
    words = [choice[key] for choice in choices for key in ("op", "backend", "reason")]
    words += [manifest[key] for key in ("engine", "distribution", "device")]
    words += [facts.space.kind, manifest["config"]["model"]["kind"]]
    numbers += [manifest["parameters"] + 1, manifest["processes"]]  # ZeRO 3 once counted none
    for value, kind in [*((n, int) for n in numbers), *((w, str) for w in words)]:
        if type(value) is not kind or (kind is int and value < 1):
            raise TypeError(f"{value!r} is not what belongs there")


def _upgraded(manifest: dict[str, Any]) -> dict[str, Any]:
    """As `upgraded`, of a sound one.

    The first version told networks of class labels alone, by keys of the model and of the data, and
    kept DeepSpeed's settings only as they were after ours were merged into them.
    """
    if "deepspeed_config" in manifest and "deepspeed_json" not in manifest:
        merged = copy.deepcopy(manifest["deepspeed_config"])
        merged["zero_optimization"].pop("compute_grad_norm", None)  # these two were the engine's
        merged["bf16"].pop("check_grad_overflow", None)
        manifest = {**manifest, "deepspeed_json": users_part(merged)}
    data = manifest["data"]
    if "num_classes" not in data:
        return manifest
    manifest = copy.deepcopy(manifest)
    data, config = manifest["data"], manifest["config"]
    dropout = config["model"].pop("label_dropout", 0.1)
    classes, channels = data.pop("num_classes"), data["shape"][0]
    if channels > 2**16:
        raise ValueError(f"{channels} channels")
    space = Space(
        data.pop("space"), (data.pop("scale"),) * channels, (data.pop("shift"),) * channels
    )
    conditions = {"label": label.described(classes, null=dropout > 0)} if classes else {}
    data |= Facts(tuple(data["shape"]), space, conditions).to_json()
    config["conditions"] = {"label": {"kind": "label", "dropout": dropout}} if classes else {}
    return manifest


def with_new_keys(manifest: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """`manifest` with what it does not say yet: keys newer than it, whose defaults are what was done before.

    config: the continuation's; the outside modules that it names may be imported for the manifest's own settings.
    A manifest whose settings are none of this version's is given back as it is.
    """
    named = [getattr(config, section).kind for section in KINDS]
    named += [each.kind for each in config.conditions.values() if each is not None]
    try:
        filled = build(manifest["config"], [kind for kind in named if "." in kind])
    except ConfigError:
        return manifest
    return {**manifest, "config": filled.model_dump(mode="json")}


def run_folder(config: RunConfig, fingerprint: str) -> Path:
    """Where the run writes: `run_dir`, or runs/NAME-HASH with the hash of what a resume compares."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    json_file = getattr(config.engine, "json_file", None)
    decided = {
        "config": config.model_dump(mode="json"),
        "data": {"fingerprint": fingerprint},
        "deepspeed_json": users_part(read(json_file)) if json_file else {},
    }
    text = json.dumps(comparable(decided), sort_keys=True)
    return Path("runs") / f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def comparable(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that must be equal for a resume to continue the same run: all but MAY_CHANGE."""
    config = {k: v for k, v in manifest["config"].items() if k not in MAY_CHANGE}
    for section in ("train", "model", "engine"):
        kept = {k: v for k, v in config[section].items() if f"{section}.{k}" not in MAY_CHANGE}
        config[section] = kept
    config["conditions"] = {
        name: {k: v for k, v in each.items() if f"conditions.{each['kind']}.{k}" not in MAY_CHANGE}
        for name, each in config["conditions"].items()
        if each is not None
    }
    config["data"] = manifest["data"]["fingerprint"]
    engine = manifest["config"]["engine"]
    if config["engine"].pop("json_file", None) and manifest["deepspeed_json"]:
        config["engine"]["json_file"] = manifest["deepspeed_json"]  # what it says, wherever it lies
    if config["train"].get("exact_sums"):  # the leaves of its tree
        config["train"]["micro_batch"] = manifest["config"]["train"]["micro_batch"]
    if engine["kind"] not in ENGINES:  # from outside: it knows its own state alone
        config["engine"]["kind"] = engine["kind"]
    return {"config": config}


def changed(before: dict[str, Any], now: dict[str, Any], shards: bool) -> list[str]:
    """`key: old -> new` of all that must be equal for a resume and is not.

    Both are whole manifests. shards: whether the state can be cut in other pieces; that of earlier versions fits the
    engine, the ZeRO stage and the number of processes that wrote it (engine torch: any number).
    """
    old, new = comparable(before), comparable(now)
    kinds = [each["config"]["engine"]["kind"] for each in (before, now)]
    if kinds[0] != kinds[1] and all(kind in ENGINES for kind in kinds):
        for each in (old, new):  # it tells how DeepSpeed computes
            each["config"]["engine"].pop("json_file", None)
    if not shards:
        for each, manifest in ((old, before), (new, now)):
            engine = manifest["config"]["engine"]
            each["config"]["engine"] |= {"kind": engine["kind"], "zero": engine.get("zero")}
            if kinds[0] == "deepspeed":
                each["processes"] = manifest["processes"]
    return differences(old, new)


def free_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key: old -> new` of what may change and did, for what the numbers depend on to rounding.

    Both are manifests of one run.
    """
    quiet = {"name", "run_dir", "log", "sample", "checkpoint", "data", "train"}
    old, new = (
        {
            **{k: v for k, v in each["config"].items() if k not in quiet},
            "train": {"micro_batch": each["config"]["train"]["micro_batch"]},
            "processes": each["processes"],
        }
        for each in (before, now)
    )
    if now["config"]["train"].get(
        "exact_sums"
    ):  # whose sums depend on them, and not on the processes
        for each, manifest in ((old, before), (new, now)):
            each["processes"], each["threads"] = 0, manifest["threads"]
    both = old["engine"].keys() & new["engine"].keys() - {"json_file"}
    for each in (old, new):
        each["engine"] = {k: v for k, v in each["engine"].items() if k in both}
    return differences(old, new)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every value in which two nested mappings differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found
