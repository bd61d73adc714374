"""The training loop: one readable function. Everything it calls can be read alone.

The step is: a batch by address, `noise` (draws t, mixes the noise in), the network, `loss` (losses and
the gradient in one pass), the engine's update. Nothing in it waits for the device; once an interval the
sums are read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from speed_engine.atomic_files import write_json
from speed_engine.config import RunConfig
from speed_engine.data import order
from speed_engine.data.loader import StoppedWaiting
from speed_engine.distributed import Processes, lost_connection, start, stop
from speed_engine.distributed.launched import place
from speed_engine.engines import optimizer
from speed_engine.engines.host_memory import keep_freed_memory
from speed_engine.errors import SaidElsewhere
from speed_engine.progress import for_reader
from speed_engine.training import (
    assembly,
    checkpoint,
    heartbeat,
    metrics,
    preview,
    rollback,
    save_time,
    sealed,
    validation,
)
from speed_engine.training import manifest as manifests
from speed_engine.training import scales as adaln
from speed_engine.training.agreement import (
    ENDS,
    FOLDER_GONE,
    READ_FAILED,
    SAVE_FAILED,
    Agreement,
)
from speed_engine.training.assembly import Parts
from speed_engine.training.guard import Guard
from speed_engine.training.heartbeat import Pulse
from speed_engine.training.interrupt import REQUEUE, REQUEUED, Interrupt
from speed_engine.training.library_log import LibraryLog, libraries_apart
from speed_engine.training.reading import Reading
from speed_engine.training.replay import Unrepeatable
from speed_engine.training.resume import begin, load, resume
from speed_engine.training.run_lock import RunLock, refuse_other_folders
from speed_engine.training.saving import Saver
from speed_engine.training.spikes import Spikes
from speed_engine.training.watch import LOST, Watch, kept

DONE, NOT_FINITE, UNREPEATABLE = 0, 3, 5  # exit codes; LOST, REQUEUED


def train(config: RunConfig, judge: preview.Judge | None = None) -> int:
    """Train as `config` says, continuing what its run folder holds. Returns the exit code.

    judge: scores the pictures of `sample.every`, where it can.
    0: done, or stopped on request with a checkpoint. 75: the same by SIGUSR1, unfinished. 3: gradients were not finite
    for too long. 4: another process is gone or frozen. 5: a gradient computed again was another one.
    Raises ValueError (a user's mistake, in one sentence; CheckpointError, DataError are such).
    """
    pulse = Pulse()
    told = place(os.environ)
    rank, world = (told.rank, told.world) if told else (0, 1)
    with (
        libraries_apart(rank) as log,
        Interrupt() as interrupt,
        Watch(interrupt, pulse, rank, world) as watch,
    ):
        try:
            processes = start(config.engine.device, config.train.meeting_seconds)
            pulse.waiting = processes.waiting
            code = _train(config, processes, judge, watch, log)
        except BaseException as error:
            if lost_connection(error):
                words = f"{str(error).splitlines()[0]}; no step was made"
                if watch.folder is not None:
                    words = f"{heartbeat.missing(watch.folder, rank, world)}; {kept(pulse)}"
                print(f"error (process {rank}): {words}", file=sys.stderr, flush=True)
                stop(together=False)
                return LOST
            watch.ended(str(error) or type(error).__name__)
            stop(together=False)  # the others may be waiting for this process somewhere else
            raise
        stop(together=True)
        pulse.beat("ended")
    return code


def _train(
    config: RunConfig,
    processes: Processes,
    judge: preview.Judge | None,
    watch: Watch,
    log: LibraryLog,
) -> int:
    # ------------------------------------------------------------------ the parts
    host_memory = keep_freed_memory(processes.device)
    parts = assembly.build(config, processes)
    run = manifests.run_folder(parts.config, parts.source.fingerprint)
    blueprint = assembly.build_model(parts.config, parts.facts, "meta")
    grids = processes.attempt(lambda: preview.of(parts, run, blueprint, judge))
    held = processes.attempt(lambda: RunLock(run) if processes.first else None)
    try:
        return _train_in(run, held, parts, blueprint, grids, host_memory, watch, log)
    finally:
        if held is not None:
            began = (run / "manifest.json").exists()
            if not began:
                heartbeat.forget(run)
            held.close(undo=not began)


def _train_in(
    run: Path,
    held: RunLock | None,
    parts: Parts,
    blueprint: nn.Module,
    grids: preview.Preview | None,
    host_memory: str,
    watch: Watch,
    log: LibraryLog,
) -> int:
    """Train in a run folder that is ours. held: the first process's lock of it."""
    config, processes, limits = parts.config, parts.processes, parts.config.train
    interrupt, pulse = watch.interrupt, watch.pulse

    def warn(text: str) -> None:
        with contextlib.suppress(OSError):  # of an output that is gone
            print(for_reader(f"WARNING: {text}", sys.stdout), flush=True)

    def look_after_folder() -> None:
        seconds = (limits.stall_seconds, limits.first_step_seconds)
        processes.attempt(lambda: watch.at_work(run, *seconds))

    refuse_other_folders(run, held.token if held else "", processes)
    if held is not None and held.unlocked:
        warn(held.unlocked)
    look_after_folder()
    found = checkpoint.agreed_newest(run, warn, processes)
    begun = begin(parts, found)
    measures = validation.of(parts)
    engine = assembly.open_engine(parts)
    manifest: dict[str, Any] = manifests.describe(parts, engine.facts())
    manifest |= begun | {"host_memory": host_memory}
    do = assembly.open_step(parts, engine)
    first_step = resume(parts, run, found, engine, manifest, do.meter)
    pulse.step, pulse.saved = first_step, None if found is None else first_step

    def tell() -> metrics.Journal:
        if processes.first:
            write_json(run / "manifest.json", sealed.seal(manifest))
        return metrics.Journal(run, first_step, config, parts.choices, not processes.first)

    journal = processes.attempt(tell)
    log.into(run, journal.say)
    for remark in getattr(parts.source, "remarks", ()):
        journal.say(f"WARNING: {remark}")
    if processes.first:
        trained = sum(each.numel() for each in blueprint.parameters() if each.requires_grad)
        size = save_time.checkpoint_bytes(trained, len(config.optim.emas()))
        if slow := save_time.at_start(run, size):
            journal.say(f"WARNING: {slow}")
    if config.train.resident:
        journal.say(parts.feed)
    macs = assembly.macs_per_sample(config, parts.facts, training=True)
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
        pulse,
    )

    # ------------------------------------------------------------------ the loop
    step, code = first_step, DONE
    steps, log_every = config.train.steps, config.log.every
    validate_every = config.validation.every
    left_out: list[int] = manifest.get("left_out", [])
    times_back: int = manifest.get("rollbacks", 0)
    spikes = Spikes(limits.spike_sigmas, limits.spike_history) if limits.spike_sigmas else None
    scales = adaln.of(parts.model, processes.device, config.engine)
    alone = processes.world == 1  # can save wherever it waits for data; many must agree first
    stopping = (lambda: interrupt.requested) if alone else (lambda: False)
    readers = contextlib.ExitStack()

    def from_here() -> tuple[metrics.Rate, Guard, Reading]:
        rate = metrics.Rate(macs, processes, step)
        row, window, most = limits.max_bad_steps, limits.bad_window, limits.max_bad_in_window
        guard = Guard(row, engine.skip_count(), step, window, most)
        readers.close()  # of the batches until now
        batches = parts.loader.batches(step, steps, stopping, tuple(left_out))
        readers.callback(batches.close)
        arriving = rate.waiting(heartbeat.noted(batches, pulse))
        of_one_step = functools.partial(parts.loader.of_one_step, arriving)
        return rate, guard, Reading(of_one_step, processes, step, steps)

    def unreadable(step: int) -> None:
        if pulse.saved != step:
            saver.save_at_end(step)
            journal.say(f"stopped at step {step}, which is saved in {run}")

    def stopped(step: int) -> None:
        saver.save_at_end(step)
        journal.say(f"stopped on request; step {step} is saved in {run}")

    with journal, saver, readers:
        rate, guard, reading = from_here()
        agreement = Agreement(processes)
        while step < steps:
            try:
                ready = iter(reading.next())
            except StoppedWaiting:
                stopped(step)
                code = REQUEUED if interrupt.wanted == REQUEUE else DONE
                break
            except (ValueError, OSError):  # a sample that cannot be read, here or elsewhere
                unreadable(step)
                raise
            try:
                tells = (step + 1) % log_every == 0 or step + 1 == steps
                seen = scales if tells else None
                with contextlib.nullcontext() if seen is None else seen.noting():
                    do(step, ready)
            except (Unrepeatable, SaidElsewhere) as error:
                if isinstance(error, Unrepeatable):
                    print(f"error (process {processes.rank}): {error}", file=sys.stderr, flush=True)
                code = UNREPEATABLE
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
                    "grad_norm": engine.grad_norm(),
                    "adaln_scale": None if scales is None else scales.read(processes),
                }
                if measures is not None and (step % validate_every == 0 or step == steps):
                    with pulse.during("validate"):
                        line |= rate.without(lambda: measures.measure(engine))
                if grids is not None and grids.due(step):
                    drawing = functools.partial(grids.draw, step, engine, journal)
                    with pulse.during("draw"):
                        line |= rate.without(drawing)
                journal.write(line)
                reason = guard.verdict(line["loss"])
                if reason is None and spikes is not None:
                    reason = guard.blame(spikes.verdict(do.meter.last_bins))
                noting = functools.partial(rollback.note, parts, run, guard.bad, left_out)
                journal.told_or_not(rollback.FILE, noting)
                back = None
                if reason and times_back < limits.max_rollbacks and engine.can_load():
                    saver.finish()
                    back = rollback.target(run, guard.guilty, processes, warn)
                if reason and back is not None:
                    journal.say(
                        f"WARNING: {reason}; going back from step {step} to {back.step} without their data"
                    )
                    left_out += [order.data_step(each, left_out) for each in guard.guilty]
                    times_back += 1
                    manifest |= {"left_out": left_out, "rollbacks": times_back}
                    load(parts, back, engine, do.meter)
                    step = pulse.step = pulse.saved = back.step
                    journal.rewind(step)
                    rate, guard, reading = from_here()
                    continue
                if reason:
                    journal.say(
                        f"stopped at step {step}: {reason}; lower optim.lr or set optim.clip and "
                        f"start again in another run_dir than {run}"
                    )
                    code = NOT_FINITE
                    break
            if step == steps or step % config.checkpoint.every == 0:
                saver.save(step, last=step == steps)
            own = FOLDER_GONE if watch.gone else SAVE_FAILED if saver.failed else interrupt.wanted
            agreed = agreement.on(own if reading.look_ahead() else READ_FAILED)
            if agreed == READ_FAILED:
                try:
                    reading.end_together()
                except (ValueError, OSError):
                    unreadable(step)
                    raise
            elif agreed == FOLDER_GONE:
                saver.save(step)  # makes it anew, and says so
                look_after_folder()
            elif agreed == SAVE_FAILED:
                saver.finish()
            elif agreed in ENDS and step < steps:
                stopped(step)
                code = REQUEUED if agreed == REQUEUE else DONE
                break
        agreement.close()
        saver.finish(last=True)
        if code == DONE and step == steps:
            journal.finished(step, parts.facts)
    return code
