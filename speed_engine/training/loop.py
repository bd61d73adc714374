"""The training loop: one readable function. Everything it calls can be read alone.

The step is: a batch by address, `noise` (draws t, mixes the noise in), the network, `loss` (losses and
the gradient in one pass), the engine's update. Nothing in it waits for the device; once an interval the
sums are read.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from speed_engine.atomic_files import write_json
from speed_engine.config import RunConfig
from speed_engine.distributed import Processes, start, stop
from speed_engine.engines import Engine, optimizer
from speed_engine.engines.host_memory import keep_freed_memory
from speed_engine.training import assembly, checkpoint, metrics, sealed
from speed_engine.training import manifest as manifests
from speed_engine.training.assembly import Parts
from speed_engine.training.attention import attention_facts, keep_attention
from speed_engine.training.guard import Guard
from speed_engine.training.interrupt import Interrupt
from speed_engine.weights import file as weights_file

METHOD_STATE = "timesteps.safetensors"  # of a method that changes while training runs
STOP_EVERY = 10  # steps between two agreements of many processes on whether to stop
DONE, NOT_FINITE = 0, 3  # exit codes


def train(config: RunConfig) -> int:
    """Train as `config` says, continuing what its run folder holds. Returns the exit code.

    0: done, or stopped on request with a checkpoint. 3: gradients were not finite for too long.
    Raises ValueError (a user's mistake, in one sentence; CheckpointError, DataError are such).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    processes = start(config.engine.device)
    try:
        code = _train(config, processes)
    except BaseException:
        stop(together=False)  # the others may be waiting for this process somewhere else
        raise
    stop(together=True)
    return code


def _train(config: RunConfig, processes: Processes) -> int:
    # ------------------------------------------------------------------ the parts
    host_memory = keep_freed_memory(processes.device)
    parts = assembly.build(config, processes)
    config, table = parts.config, parts.table
    blueprint = assembly.build_model(config, parts.facts, "meta")
    run = manifests.run_folder(config, parts.source.fingerprint, processes.world)
    run.mkdir(parents=True, exist_ok=True)
    held = checkpoint.lock(run) if processes.first else None
    engine = assembly.open_engine(parts)
    manifest = manifests.describe(parts, {**engine.facts(), "host_memory": host_memory})
    do = assembly.open_step(parts, engine)
    first_step = resume(parts, run, engine, manifest)
    if processes.first:
        write_json(run / "manifest.json", sealed.seal(manifest))
    journal = metrics.Journal(run, first_step, config, parts.choices, silent=not processes.first)
    logging.getLogger(__name__).info("host memory: %s", host_memory)
    for remark in getattr(parts.source, "remarks", ()):
        journal.say(f"WARNING: {remark}")
    macs = assembly.macs_per_sample(config, parts.facts)
    rate = metrics.Rate(macs, processes, first_step)
    if getattr(config.engine, "cuda_graph", False):
        do = do.captured()

    def save(step: int) -> None:
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

    # ------------------------------------------------------------------ the loop
    step, saved, code = first_step, first_step, DONE
    guard = Guard(config.train.max_bad_steps, engine.skip_count())
    steps, log_every = config.train.steps, config.log.every
    batches = parts.loader.batches(first_step, steps)
    with Interrupt() as interrupt, journal, contextlib.closing(batches):
        while step < steps:
            do(step, batches)
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
                }
                journal.write(line)
                if reason := guard.verdict(line["loss"]):
                    journal.say(
                        f"stopped at step {step}: {reason}; lower optim.lr or set optim.clip and "
                        f"start again in another run_dir than {run}"
                    )
                    code = NOT_FINITE
                    break
            if step == steps or step % config.checkpoint.every == 0:
                save(step)
                saved = step
            if processes.world == 1 or step % STOP_EVERY == 0:
                if not processes.any(interrupt.requested):
                    continue
                if saved != step:
                    save(step)
                journal.say(f"stopped on request; step {step} is saved in {run}")
                break
    if held is not None:
        held.close()
    return code


def resume(parts: Parts, run: Path, engine: Engine, manifest: dict[str, Any]) -> int:
    """Load the newest good checkpoint and return its step; 0 if there is none. Collective.

    The attention of the model, and what `manifest` says of it, become those of the checkpoint.
    Raises CheckpointError where `checkpoint.resume` forbids it, or where the run was another one.
    """

    config, model, processes = parts.config, parts.model, parts.processes

    def warn(text: str) -> None:
        if processes.first:
            print(f"WARNING: {text}", flush=True)

    wanted = config.checkpoint.resume
    found = checkpoint.newest(run, warn)
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
    changed = checkpoint.differences(manifests.comparable(before), manifests.comparable(manifest))
    if changed:
        raise checkpoint.CheckpointError(
            f"{run} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another run_dir, or go back to the old values"
        )
    if sentence := keep_attention(model, processes, before, manifest):
        warn(sentence)
    manifest["attention"] = attention_facts(model)
    engine.load(found.folder / "state")
    method = found.folder / METHOD_STATE
    parts.table.load_state_dict(load_file(method) if method.exists() else {}, found.step)
    return found.step
