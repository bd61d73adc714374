"""Where a run begins: from a checkpoint of its own, from other weights (`train.init_from`), or from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from speed_engine.engines import Engine, shards
from speed_engine.training import checkpoint, init_from, metrics
from speed_engine.training import manifest as manifests
from speed_engine.training.assembly import Parts
from speed_engine.training.attention import attention_facts, keep_attention
from speed_engine.training.saving import INTERVAL_STATE, METHOD_STATE


def begin(parts: Parts, found: checkpoint.Found | None) -> dict[str, Any]:
    """The weights of `train.init_from` in the model of a run that starts; what the manifest says of it."""
    train = parts.config.train
    if train.init_from is None or found is not None:
        return {}
    named = [parts.config.model.kind] if "." in parts.config.model.kind else []
    done = init_from.initialise(parts.model, Path(train.init_from), train.init_weights, named)
    if parts.processes.first:
        print("\n".join(init_from.sentences(done)), flush=True)
    return {"init": done}


def resume(
    parts: Parts,
    run: Path,
    found: checkpoint.Found | None,
    engine: Engine,
    manifest: dict[str, Any],
    meter: metrics.Meter,
) -> int:
    """Load the checkpoint that was found and return its step; 0 if there is none. Collective.

    The attention of the model, and what `manifest` says of it and of the data that are left out, become those of the
    checkpoint.
    Raises CheckpointError where `checkpoint.resume` forbids it, or where the run was another one.
    """

    config, model, processes = parts.config, parts.model, parts.processes

    def warn(text: str) -> None:
        if processes.first:
            print(f"WARNING: {text}", flush=True)

    wanted = config.checkpoint.resume
    if found is None:
        if wanted == "must":
            raise checkpoint.CheckpointError(
                f"checkpoint.resume=must, but {run} holds no checkpoint; check run_dir"
            )
        return 0
    if wanted == "never":
        raise checkpoint.CheckpointError(
            f"checkpoint.resume=never, but {run} holds a run at step {found.step}; "
            "choose another run_dir or remove the folder"
        )
    before = manifests.upgraded(found.manifest, found.folder)
    before = manifests.with_new_keys(before, config)
    any_pieces = shards.are_in(found.folder / "state")
    if changed := manifests.changed(before, manifest, shards=any_pieces):
        raise checkpoint.CheckpointError(
            f"{run} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another run_dir, or go back to the old values"
        )
    if sentence := keep_attention(model, processes, before, manifest):
        warn(sentence)
    manifest["attention"] = attention_facts(model)
    if changes := manifests.free_changes(before, manifest):
        warn(f"going on with other settings, which may change last bits: {'; '.join(changes)}")
        before.setdefault("continued", []).append({"step": found.step, "changed": changes})
    for key in ("continued", "init", "left_out", "rollbacks"):
        if key in before:
            manifest[key] = before[key]
    load(parts, found, engine, meter)
    return found.step


def load(parts: Parts, found: checkpoint.Found, engine: Engine, meter: metrics.Meter) -> None:
    """The state of a checkpoint: the engine's, the method's, and the line of metrics that was begun. Collective."""
    engine.load(found.folder / "state")
    method = found.folder / METHOD_STATE
    parts.table.load_state_dict(load_file(method) if method.exists() else {}, found.step)
    meter.read(parts.processes)  # forget what another line held
    interval = found.folder / INTERVAL_STATE
    if interval.exists():  # earlier versions kept none
        meter.load_state(load_file(interval)["sums"], parts.processes)
