"""The training loop: one readable function. Everything it calls can be read alone.

The step is: a batch by address, `noise` (draws t, mixes the noise in), the network, `loss` (losses and
the gradient in one pass), the engine's update. Nothing in it waits for the device; once an interval the
sums are read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from speed_kernels.contract import choose

from speed_engine import checkpoint, exchange, optim, setup, telemetry
from speed_engine.config import RunConfig, kind_module
from speed_engine.feed import Batch, Feed
from speed_engine.interrupt import Interrupt
from speed_engine.processes import Processes, start, stop
from speed_engine.step_table import StepTable

OPS = ("noise", "loss", "adamw_ema")
STOP_EVERY = 10  # steps between two agreements of many processes on whether to stop
DONE, NOT_FINITE = 0, 3  # exit codes


@dataclass(frozen=True)
class DiffusionStep:
    """Forward and backward of one micro-batch."""

    config: RunConfig
    table: StepTable
    engine: Any
    backends: dict[str, str]
    grad_scale: float  # 1 / (micro batch x accumulation): gradients add up to the mean

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (losses_3B: total, mse, vb of each sample; row_B of the table). Never waits."""
        train = self.config.train
        x_t, row_B, tau_B = self.table.noise(
            batch.x0,
            batch.address,
            seed=self.config.seed,
            num_slots=train.global_batch,
            stratified=train.stratified,
            dtype=self.engine.compute_dtype,
            backend=self.backends["noise"],
        )
        labels = () if batch.labels is None else (batch.labels,)
        out = self.engine.forward(x_t, tau_B, *labels)
        loss, losses_3B = self.table.loss(
            out,
            batch.x0,
            row_B,
            batch.address,
            seed=self.config.seed,
            vb_scale=train.vb_scale,
            grad_scale=self.grad_scale,
            unit_upstream=True,  # both engines call backward on this very scalar
            backend=self.backends["loss"],
        )
        self.engine.backward(loss)
        return losses_3B, row_B


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
    micro_batch, accumulation = setup.split_batch(config, processes.world)
    kernels = config.kernels
    choices = [choose(op, processes.device, kernels.backend, kernels.strict) for op in OPS]
    backends = {choice.op: choice.backend for choice in choices}
    source = setup.build_source(config)
    model = setup.build_model(config, source.shape, source.num_classes)
    blueprint = setup.build_model(config, source.shape, source.num_classes, "meta")
    table = setup.build_table(config).to(processes.device)
    feed = Feed(
        source,
        config.seed,
        config.train.global_batch,
        micro_batch,
        model.null_label,
        config.model.label_dropout,
        config.train.flip,
        processes,
        backends["noise"],
    )
    run = Path(config.run_dir)
    run.mkdir(parents=True, exist_ok=True)
    held = checkpoint.lock(run) if processes.first else None
    engine = kind_module("engine", config.engine.kind).open_engine(
        config.engine,
        model,
        config.optim,
        processes,
        micro_batch=micro_batch,
        accumulation=accumulation,
        backend=backends["adamw_ema"],
    )
    manifest = setup.describe(config, processes, source, model, choices, engine.facts())
    first_step = resume(config, run, processes, engine, manifest)
    if processes.first:
        checkpoint.write_json(run / "manifest.json", manifest)
    journal = telemetry.Journal(run, first_step, config, choices, silent=not processes.first)
    meter = telemetry.Meter(processes.device, table.num_rows)
    rate = telemetry.Rate(
        setup.macs_per_sample(config, source.shape, source.num_classes), processes, first_step
    )
    do = DiffusionStep(config, table, engine, backends, 1.0 / (micro_batch * accumulation))

    def save(step: int) -> None:
        def write(folder: Path) -> None:
            state = folder / "state"
            state.mkdir(exist_ok=True)
            engine.save(state)
            for name in ("model", "ema"):
                weights = engine.weights(ema=name == "ema")
                if weights is not None:
                    notes = {"step": step, "run": manifest["config"], "data": manifest["data"]}
                    exchange.save(folder / f"{name}.safetensors", blueprint, weights, notes)

        checkpoint.save(run, step, processes, write, manifest, config.checkpoint.keep)

    # ------------------------------------------------------------------ the loop
    step, saved, skipped, code = first_step, first_step, engine.num_skipped(), DONE
    steps, log_every = config.train.steps, config.log.every
    with Interrupt() as interrupt, journal:
        for number, batch in enumerate(feed.batches(first_step, steps), start=1):
            losses_3B, row_B = do(batch)
            meter.add(losses_3B, row_B)
            engine.step(optim.learning_rate(config.optim, step))
            if number % accumulation:
                continue
            step += 1
            journal.advance(step)
            if step % log_every == 0 or step == steps:
                newly_skipped, skipped = engine.num_skipped() - skipped, engine.num_skipped()
                line = {"step": step, "images": step * config.train.global_batch}
                line |= meter.read(processes)
                line |= rate.read(step, config.train.global_batch)
                line |= {"lr": optim.learning_rate(config.optim, step - 1), "skipped": skipped}
                journal.write(line)
                if newly_skipped >= min(config.train.max_bad_steps, log_every):
                    journal.say(
                        f"stopped at step {step}: {newly_skipped} updates since the last line had "
                        "gradients that are not finite and were skipped; lower optim.lr or set "
                        f"optim.clip and start again in another run_dir than {run}"
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


def resume(
    config: RunConfig, run: Path, processes: Processes, engine: Any, manifest: dict[str, Any]
) -> int:
    """Load the newest good checkpoint and return its step; 0 if there is none. Collective.

    Raises CheckpointError where `checkpoint.resume` forbids it, or where the run was another one.
    """

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
    changed = checkpoint.differences(setup.comparable(found.manifest), setup.comparable(manifest))
    if changed:
        raise checkpoint.CheckpointError(
            f"{run} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another run_dir, or go back to the old values"
        )
    engine.load(found.folder / "state")
    return found.step
