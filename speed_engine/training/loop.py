"""The training loop: one readable function. Everything it calls can be read alone.

The step is: a batch by address, `noise` (draws t, mixes the noise in), the network, `loss` (losses and
the gradient in one pass), the engine's update. Nothing in it waits for the device; once an interval the
sums are read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from speed_engine.atomic_files import write_json
from speed_engine.config import RunConfig
from speed_engine.data import order
from speed_engine.data.loader import StoppedWaiting
from speed_engine.distributed import Processes, lost_connection, start, stop
from speed_engine.distributed.launched import place
from speed_engine.engines import Engine, optimizer
from speed_engine.training import (
    agreement,
    assembly,
    checkpoint,
    heartbeat,
    init_from,
    metrics,
    rollback,
    sealed,
)
from speed_engine.training import manifest as manifests
from speed_engine.training.assembly import Parts
from speed_engine.training.attention import attention_facts, keep_attention
from speed_engine.training.guard import Guard
from speed_engine.training.heartbeat import Pulse
from speed_engine.training.interrupt import REQUEUE, REQUEUED, Interrupt
from speed_engine.training.watch import LOST, Watch, kept
from speed_engine.weights import file as weights_file

METHOD_STATE = "timesteps.safetensors"  # of a method that changes while training runs
DONE, NOT_FINITE = 0, 3  # exit codes; LOST, REQUEUED
FOLDER_GONE = REQUEUE + 1  # what processes agree on beside STOP and REQUEUE


def train(config: RunConfig) -> int:
    """Train as `config` says, continuing what its run folder holds. Returns the exit code.

    0: done, or stopped on request with a checkpoint. 75: the same by SIGUSR1, unfinished. 3: gradients were not finite
    for too long. 4: another process is gone or frozen.
    Raises ValueError (a user's mistake, in one sentence; CheckpointError, DataError are such).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    pulse = Pulse()
    told = place(os.environ)
    rank, world = (told.rank, told.world) if told else (0, 1)
    with Interrupt() as interrupt, Watch(interrupt, pulse, rank, world) as watch:
        try:
            code = _train(config, start(config.engine.device), interrupt, watch)
        except BaseException as error:
            if lost_connection(error) and watch.folder is not None:
                who = heartbeat.missing(watch.folder, rank, world)
                print(f"error (process {rank}): {who}; {kept(pulse)}", file=sys.stderr, flush=True)
                stop(together=False)
                return LOST
            watch.ended(str(error) or type(error).__name__)
            stop(together=False)  # the others may be waiting for this process somewhere else
            raise
        stop(together=True)
        pulse.beat("ended")
    return code


def _train(config: RunConfig, processes: Processes, interrupt: Interrupt, watch: Watch) -> int:
    # ------------------------------------------------------------------ the parts
    parts = assembly.build(config, processes)
    config, table = parts.config, parts.table
    blueprint = assembly.build_model(config, parts.facts, "meta")
    run = manifests.run_folder(config, parts.source.fingerprint, processes.world)
    held = agreement.hold(run, processes)
    watch.at_work(run, config.train.stall_seconds, config.train.first_step_seconds)
    found = _found(parts, run)
    begun = _begin(parts) if found is None else {}
    engine = assembly.open_engine(parts)
    manifest = manifests.describe(parts, engine.facts()) | begun
    do = assembly.open_step(parts, engine)
    first_step = 0 if found is None else resume(parts, run, found, engine, manifest)
    if processes.first:
        write_json(run / "manifest.json", sealed.seal(manifest))
    journal = metrics.Journal(run, first_step, config, parts.choices, silent=not processes.first)
    for remark in getattr(parts.source, "remarks", ()):
        journal.say(f"WARNING: {remark}")
    macs = assembly.macs_per_sample(config, parts.facts)
    rate = metrics.Rate(macs, processes, first_step)
    if getattr(config.engine, "cuda_graph", False):
        do = do.captured()

    pulse = watch.pulse
    pulse.step, pulse.saved = first_step, first_step if found else None

    def save(step: int) -> None:
        pulse.beat("save")
        agreement.still_held(watch.folder_is_there(), run, step, processes)
        method = table.state_dict(do.reach.all_reduce)
        processes.assert_equal(method, "the table of time steps")

        def write(folder: Path) -> None:
            state = folder / "state"
            state.mkdir(exist_ok=True)
            engine.save(state)
            if processes.first and method:
                save_file(method, folder / METHOD_STATE)
            for name in ("model", "ema"):
                weights = engine.weights(ema=name == "ema")
                if weights is not None:
                    notes = {"step": step, "run": manifest["config"], "data": manifest["data"]}
                    weights_file.save(folder / f"{name}.safetensors", blueprint, weights, notes)

        checkpoint.save(run, step, processes, write, manifest, config.checkpoint.keep)
        pulse.saved = step
        pulse.beat("step")

    # ------------------------------------------------------------------ the loop
    step, code, wanted = first_step, DONE, 0
    left_out: list[int] = manifest.get("left_out", [])
    limits = config.train

    def guarded() -> Guard:
        row, window, most = limits.max_bad_steps, limits.bad_window, limits.max_bad_in_window
        return Guard(row, engine.skip_count(), step, window, most)

    guard = guarded()
    steps, log_every = config.train.steps, config.log.every
    alone = processes.world == 1  # can save wherever it waits for data; many must agree first
    stopping = (lambda: interrupt.requested) if alone else (lambda: False)
    batches = parts.loader.batches(step, steps, stopping, left_out)
    agreed = processes.largest_later(0)  # looked at a step later, so that nobody waits for it
    with journal, contextlib.ExitStack() as readers:
        readers.callback(batches.close)
        while step < steps:
            try:
                do(step, heartbeat.noted(batches, pulse))
            except StoppedWaiting:
                wanted = interrupt.wanted
                break
            step += 1
            pulse.beat("step", step)
            guard.update(engine.skip_count())
            journal.advance(step)
            if step % log_every == 0 or step == steps:
                line: dict[str, Any] = {"step": step, "images": step * config.train.global_batch}
                line |= do.meter.read(processes)
                line |= rate.read(step, config.train.global_batch)
                line |= {
                    "lr": optimizer.learning_rate(config.optim, step - 1),
                    "skipped": engine.num_skipped(),
                }
                journal.write(line)
                reason = guard.verdict(line["loss"])
                rollback.note(parts, run, guard.bad, left_out)
                back = None
                if (
                    reason
                    and manifest.get("rollbacks", 0) < limits.max_rollbacks
                    and engine.can_load()
                ):
                    back = rollback.target(run, guard.guilty, processes, _warn)
                if reason and back is not None:
                    journal.say(
                        f"WARNING: {reason}; going back from step {step} to {back.step} without their data"
                    )
                    left_out += [order.data_step(each, left_out) for each in guard.guilty]
                    manifest |= {
                        "left_out": left_out,
                        "rollbacks": manifest.get("rollbacks", 0) + 1,
                    }
                    batches.close()
                    load(parts, back, engine)
                    step = pulse.step = pulse.saved = back.step
                    do.meter.read(processes)
                    journal.rewind(step)
                    rate = metrics.Rate(macs, processes, step)
                    guard = guarded()
                    batches = parts.loader.batches(step, steps, stopping, left_out)
                    readers.callback(batches.close)
                    continue
                if reason:
                    journal.say(
                        f"stopped at step {step}: {reason}; lower optim.lr or set optim.clip and "
                        f"start again in another run_dir than {run}"
                    )
                    code = NOT_FINITE
                    break
            if step == steps or step % config.checkpoint.every == 0:
                save(step)
            asked = FOLDER_GONE if watch.gone else interrupt.wanted
            wanted, agreed = agreed(), processes.largest_later(asked)
            if wanted := (asked if alone else wanted):
                break
        agreed()
        if wanted == FOLDER_GONE:
            agreement.still_held(False, run, step, processes)
        if wanted and step < steps:
            if pulse.saved != step:
                save(step)
            journal.say(f"stopped on request; step {step} is saved in {run}")
            code = REQUEUED if wanted == REQUEUE else DONE
    if held is not None:
        held.close()
    return code


def _begin(parts: Parts) -> dict[str, Any]:
    """The weights of `train.init_from` in the model of a run that starts; what the manifest says of it."""
    train = parts.config.train
    if train.init_from is None:
        return {}
    named = [parts.config.model.kind] if "." in parts.config.model.kind else []
    done = init_from.initialise(parts.model, Path(train.init_from), train.init_weights, named)
    if parts.processes.first:
        print("\n".join(init_from.sentences(done)), flush=True)
    return {"init": done}


def _warn(text: str) -> None:
    print(f"WARNING: {text}", flush=True)


def _found(parts: Parts, run: Path) -> checkpoint.Found | None:
    """The checkpoint that all processes go on from; None: this run starts. Collective.

    Raises CheckpointError where `checkpoint.resume` forbids it.
    """
    wanted = parts.config.checkpoint.resume
    found = agreement.newest(run, parts.processes, _warn)
    if found is None and wanted == "must":
        raise checkpoint.CheckpointError(
            f"checkpoint.resume=must, but {run} holds no checkpoint; check run_dir"
        )
    if found is not None and wanted == "never":
        raise checkpoint.CheckpointError(
            f"checkpoint.resume=never, but {run} holds a run at step {found.step}; "
            "choose another run_dir or remove the folder"
        )
    return found


def resume(
    parts: Parts, run: Path, found: checkpoint.Found, engine: Engine, manifest: dict[str, Any]
) -> int:
    """Load a checkpoint and return its step. Collective.

    The attention of the model, and what `manifest` says of it, become those of the checkpoint.
    Raises CheckpointError where the run was another one.
    """
    config, model, processes = parts.config, parts.model, parts.processes
    before = manifests.upgraded(found.manifest, found.folder)
    before = manifests.with_new_keys(before, config)
    changed = checkpoint.differences(manifests.comparable(before), manifests.comparable(manifest))
    if changed:
        raise checkpoint.CheckpointError(
            f"{run} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another run_dir, or go back to the old values"
        )
    sentence = keep_attention(model, processes, before, manifest)
    if sentence and processes.first:
        _warn(sentence)
    manifest["attention"] = attention_facts(model)
    if "init" in before:
        manifest["init"] = before["init"]
    for key in ("left_out", "rollbacks"):
        if key in before:
            manifest[key] = before[key]
    load(parts, found, engine)
    return found.step


def load(parts: Parts, found: checkpoint.Found, engine: Engine) -> None:
    """The engine's state and the method's, from a checkpoint. Collective."""
    engine.load(found.folder / "state")
    method = found.folder / METHOD_STATE
    parts.table.load_state_dict(load_file(method) if method.exists() else {}, found.step)
