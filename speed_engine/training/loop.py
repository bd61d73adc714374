"""The training loop: one readable function. Everything it calls can be read alone.

The step is: a batch by address, `noise` (draws t, mixes the noise in), the network, `loss` (losses and
the gradient in one pass), the engine's update. Nothing in it waits for the device; once an interval the
sums are read.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from speed_engine.atomic_files import write_json
from speed_engine.config import RunConfig
from speed_engine.distributed import Processes, start, stop
from speed_engine.engines import Engine, optimizer
from speed_engine.engines.host_memory import keep_freed_memory
from speed_engine.training import (
    assembly,
    checkpoint,
    init_from,
    metrics,
    preview,
    sealed,
    validation,
)
from speed_engine.training import manifest as manifests
from speed_engine.training.assembly import Parts
from speed_engine.training.attention import attention_facts, keep_attention
from speed_engine.training.guard import Guard
from speed_engine.training.interrupt import Interrupt
from speed_engine.training.run_lock import RunLock, refuse_other_folders
from speed_engine.training.saving import INTERVAL_STATE, METHOD_STATE, Saver

STOP_EVERY = 10  # steps between two agreements of many processes on whether to stop
DONE, NOT_FINITE = 0, 3  # exit codes


def train(config: RunConfig, judge: preview.Judge | None = None) -> int:
    """Train as `config` says, continuing what its run folder holds. Returns the exit code.

    judge: scores the pictures of `sample.every`, where it can.
    0: done, or stopped on request with a checkpoint. 3: gradients were not finite for too long.
    Raises ValueError (a user's mistake, in one sentence; CheckpointError, DataError are such).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    processes = start(config.engine.device)
    try:
        code = _train(config, processes, judge)
    except BaseException:
        stop(together=False)  # the others may be waiting for this process somewhere else
        raise
    stop(together=True)
    return code


def _train(config: RunConfig, processes: Processes, judge: preview.Judge | None) -> int:
    # ------------------------------------------------------------------ the parts
    host_memory = keep_freed_memory(processes.device)
    parts = assembly.build(config, processes)
    run = manifests.run_folder(parts.config, parts.source.fingerprint, processes.world)
    blueprint = assembly.build_model(parts.config, parts.facts, "meta")
    grids = processes.attempt(lambda: preview.of(parts, run, blueprint, judge))
    held = processes.attempt(lambda: RunLock(run) if processes.first else None)
    try:
        return _train_in(run, held, parts, blueprint, grids, host_memory)
    finally:
        if held is not None:
            held.close(undo=not (run / "manifest.json").exists())


def _train_in(
    run: Path,
    held: RunLock | None,
    parts: Parts,
    blueprint: nn.Module,
    grids: preview.Preview | None,
    host_memory: str,
) -> int:
    """Train in a run folder that is ours. held: the first process's lock of it."""
    config, processes = parts.config, parts.processes

    def warn(text: str) -> None:
        with contextlib.suppress(OSError):  # of an output that is gone
            print(f"WARNING: {text}", flush=True)

    refuse_other_folders(run, held.token if held else "", processes)
    if held is not None and held.unlocked:
        warn(held.unlocked)
    found = checkpoint.agreed_newest(run, warn, processes)
    begun = _begin(parts, found)
    measures = validation.of(parts)
    engine = assembly.open_engine(parts)
    manifest = manifests.describe(parts, engine.facts()) | begun | {"host_memory": host_memory}
    do = assembly.open_step(parts, engine)
    first_step = resume(parts, run, found, engine, manifest, do.meter)

    def tell() -> metrics.Journal:
        if processes.first:
            write_json(run / "manifest.json", sealed.seal(manifest))
        return metrics.Journal(run, first_step, config, parts.choices, not processes.first)

    journal = processes.attempt(tell)
    logging.getLogger(__name__).info("host memory: %s", host_memory)
    for remark in getattr(parts.source, "remarks", ()):
        journal.say(f"WARNING: {remark}")
    if config.train.resident:
        journal.say(parts.feed)
    macs = assembly.macs_per_sample(config, parts.facts)
    rate = metrics.Rate(macs, processes, first_step)
    if getattr(config.engine, "cuda_graph", False):
        do = do.captured()

    reduce = do.reach.all_reduce
    saver = Saver(
        run,
        config.checkpoint,
        engine,
        parts.table,
        do.meter,
        reduce,
        blueprint,
        manifest,
        processes,
        held,
        warn,
    )

    # ------------------------------------------------------------------ the loop
    step, saved, code = first_step, first_step, DONE
    guard = Guard(config.train.max_bad_steps, engine.skip_count())
    steps, log_every = config.train.steps, config.log.every
    validate_every = config.validation.every
    batches = parts.loader.batches(first_step, steps)
    arriving = rate.waiting(batches)
    with Interrupt() as interrupt, journal, saver, contextlib.closing(batches):
        while step < steps:
            try:
                ready = iter(processes.attempt(lambda: parts.loader.of_one_step(arriving)))
            except (ValueError, OSError):  # a sample that cannot be read, here or elsewhere
                if saved != step:
                    saver.save(step, last=True)
                    journal.say(f"stopped at step {step}, which is saved in {run}")
                raise
            do(step, ready)
            step += 1
            guard.update(engine.skip_count())
            journal.advance(step)
            if step % log_every == 0 or step == steps:
                line: dict[str, Any] = {"step": step, "images": step * config.train.global_batch}
                line |= do.meter.read(processes)
                line |= rate.read(step, config.train.global_batch)
                line |= {
                    "lr": optimizer.learning_rate(config.optim, step - 1),
                    "skipped": engine.num_skipped(),
                    "grad_norm": engine.grad_norm(),
                }
                if measures is not None and (step % validate_every == 0 or step == steps):
                    line |= rate.without(lambda: measures.measure(engine))
                if grids is not None and grids.due(step):
                    drawing = functools.partial(grids.draw, step, engine, journal)
                    line |= rate.without(drawing)
                journal.write(line)
                if reason := guard.verdict(line["loss"]):
                    journal.say(
                        f"stopped at step {step}: {reason}; lower optim.lr or set optim.clip and "
                        f"start again in another run_dir than {run}"
                    )
                    code = NOT_FINITE
                    break
            if step == steps or step % config.checkpoint.every == 0:
                saver.save(step, last=step == steps)
                saved = step
            if processes.world == 1 or step % STOP_EVERY == 0:
                if processes.any(saver.failed):
                    saver.finish()
                if not processes.any(interrupt.requested):
                    continue
                if saved != step:
                    saver.save(step)
                saver.finish(last=True)
                journal.say(f"stopped on request; step {step} is saved in {run}")
                break
        saver.finish(last=True)
        if code == DONE and step == steps:
            journal.finished(step)
    return code


def _begin(parts: Parts, found: checkpoint.Found | None) -> dict[str, Any]:
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

    The attention of the model, and what `manifest` says of it, become those of the checkpoint.
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
    changed = manifests.differences(manifests.comparable(before), manifests.comparable(manifest))
    if changed:
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
    if "continued" in before:
        manifest["continued"] = before["continued"]
    if "init" in before:
        manifest["init"] = before["init"]
    engine.load(found.folder / "state")
    method = found.folder / METHOD_STATE
    parts.table.load_state_dict(load_file(method) if method.exists() else {}, found.step)
    interval = found.folder / INTERVAL_STATE
    if interval.exists():  # earlier versions kept none
        meter.load_state(load_file(interval)["sums"], processes)
    return found.step
