"""The training loop: one readable function. Everything it calls can be read alone.

The step is: a batch by address, `noise` (draws t, mixes the noise in), the network, `loss` (losses and
the gradient in one pass), the engine's update. Nothing in it waits for the device; once an interval the
sums are read.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from speed_engine.atomic_files import write_json
from speed_engine.config import RunConfig
from speed_engine.data.loader import Batch
from speed_engine.distributed import Processes, start, stop
from speed_engine.engines import optimizer
from speed_engine.step_table import StepTable
from speed_engine.timesteps.online.policy import Reach
from speed_engine.training import assembly, checkpoint, metrics, probing
from speed_engine.training.interrupt import Interrupt
from speed_engine.weights import file as weights_file

METHOD_STATE = "timesteps.safetensors"  # of a method that changes while training runs
STOP_EVERY = 10  # steps between two agreements of many processes on whether to stop
DONE, NOT_FINITE = 0, 3  # exit codes


@dataclass(frozen=True)
class DiffusionStep:
    """One step of training on this process: forward, backward, update. Never waits for the device."""

    config: RunConfig
    table: StepTable
    engine: Any
    backends: dict[str, str]
    reach: Reach
    accumulation: int
    meter: metrics.Meter
    graph: Callable[..., tuple[Tensor, Tensor]] | None = None  # see `captured`

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Make the update that follows `step` finished steps, from the next micro-batches."""
        lr = optimizer.learning_rate(self.config.optim, step)
        if self.graph is not None:
            batch = next(batches)
            noted = self.graph(lr, batch.x0, batch.labels, batch.address)
            self.table.observe(batch.address, *noted)
            self.table.refresh(step + 1, self.reach.all_reduce)
            return
        for _ in range(self.accumulation - 1):
            self.add_gradients(next(batches))
            self.engine.step(lr)  # counts the micro-batch, changes nothing
        batch = next(batches)
        row_B = self.add_gradients(batch)
        # A sample-wise policy looks at the network before and after the update.
        probe = {"forward": self.forward, "seed": self.config.seed, "reach": self.reach}
        probe |= {"dtype": self.engine.compute_dtype, "backends": self.backends}
        probing.before_update(self.table, step, batch.x0, batch.labels, row_B, **probe)
        self.engine.step(lr)
        probing.after_update(self.table, step, **probe)
        self.table.refresh(step + 1, self.reach.all_reduce)

    def captured(self) -> DiffusionStep:
        """The same step as one CUDA graph (`engine.cuda_graph`). Raises ValueError for a policy."""
        if self.table.policy is not None:
            raise ValueError(
                f"timesteps.kind={self.config.timesteps.kind} looks at the network between gradients and update, "
                "where one CUDA graph of both has no gap; set engine.cuda_graph=false"
            )
        return replace(self, graph=self.engine.captured(self.gradients))

    def forward(self, x_t: Tensor, tau_B: Tensor, labels_B: Tensor | None) -> Tensor:
        """The network as it trains."""
        labels = () if labels_B is None else (labels_B,)
        return self.engine.forward(x_t, tau_B, *labels)

    def add_gradients(self, batch: Batch) -> Tensor:
        """Forward and backward of one micro-batch -> row_B, the rows of the table that it drew."""
        row_B, losses_3B = self.gradients(batch.x0, batch.labels, batch.address)
        self.table.observe(batch.address, row_B, losses_3B)
        return row_B

    def gradients(
        self, x0: Tensor, labels: Tensor | None, address_2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `add_gradients` does on the device alone -> (row_B, losses_3B of the loss op)."""
        train, micro_batch = self.config.train, x0.shape[0]
        x_t, row_B, tau_B = self.table.noise(
            x0,
            address_2,
            seed=self.config.seed,
            num_slots=train.global_batch,
            stratified=train.stratified,
            dtype=self.engine.compute_dtype,
            backend=self.backends["noise"],
        )
        loss, losses_3B = self.table.loss(
            self.forward(x_t, tau_B, labels),
            x0,
            row_B,
            address_2,
            seed=self.config.seed,
            vb_scale=train.vb_scale,
            grad_scale=1.0 / (micro_batch * self.accumulation),  # gradients add up to the mean
            unit_upstream=True,  # both engines call backward on this very scalar
            backend=self.backends["loss"],
        )
        self.engine.backward(loss)
        self.meter.add(losses_3B, row_B)
        return row_B, losses_3B


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
    _, accumulation = assembly.split_batch(config, processes.world)
    choices = assembly.choose_kernels(config, processes.device)
    backends = {choice.op: choice.backend for choice in choices}
    source = assembly.build_source(config)
    facts = (config, source.shape, source.num_classes)
    model = assembly.build_model(*facts, processes.device, backends)
    assembly.agree_on_attention(model, processes)
    blueprint = assembly.build_model(*facts, "meta")
    table = assembly.build_table(config).to(processes.device)
    feed = assembly.build_feed(config, source, model, processes, backends["noise"])
    run = assembly.run_folder(config, source.fingerprint, processes.world)
    run.mkdir(parents=True, exist_ok=True)
    held = checkpoint.lock(run) if processes.first else None
    engine = assembly.open_engine(config, model, processes, backends["adamw_ema"])
    manifest = assembly.describe(config, processes, source, model, choices, engine.facts())
    reach = Reach(processes.rank, processes.world, processes.all_reduce())
    table.start(config.train.global_batch, source.shape)
    first_step = resume(config, run, processes, model, engine, table, manifest)
    if processes.first:
        write_json(run / "manifest.json", manifest)
    journal = metrics.Journal(run, first_step, config, choices, silent=not processes.first)
    meter = metrics.Meter(processes.device, table.num_rows)
    rate = metrics.Rate(
        assembly.macs_per_sample(config, source.shape, source.num_classes), processes, first_step
    )
    do = DiffusionStep(config, table, engine, backends, reach, accumulation, meter)
    if getattr(config.engine, "cuda_graph", False):
        do = do.captured()

    def save(step: int) -> None:
        method = table.state_dict(reach.all_reduce)
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
    step, saved, skipped, code = first_step, first_step, engine.num_skipped(), DONE
    steps, log_every = config.train.steps, config.log.every
    batches = feed.batches(first_step, steps)
    with Interrupt() as interrupt, journal, contextlib.closing(batches):
        while step < steps:
            do(step, batches)
            step += 1
            journal.advance(step)
            if step % log_every == 0 or step == steps:
                newly_skipped, skipped = engine.num_skipped() - skipped, engine.num_skipped()
                line = {"step": step, "images": step * config.train.global_batch}
                line |= meter.read(processes)
                line |= rate.read(step, config.train.global_batch)
                line |= {"lr": optimizer.learning_rate(config.optim, step - 1), "skipped": skipped}
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
    config: RunConfig,
    run: Path,
    processes: Processes,
    model: Any,
    engine: Any,
    table: StepTable,
    manifest: dict[str, Any],
) -> int:
    """Load the newest good checkpoint and return its step; 0 if there is none. Collective.

    The attention of `model`, and what `manifest` says of it, become those of the checkpoint.
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
    changed = checkpoint.differences(
        assembly.comparable(found.manifest), assembly.comparable(manifest)
    )
    if changed:
        raise checkpoint.CheckpointError(
            f"{run} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another run_dir, or go back to the old values"
        )
    if sentence := assembly.keep_attention(model, processes, found.manifest, manifest):
        warn(sentence)
    manifest["attention"] = assembly.attention_facts(model)
    engine.load(found.folder / "state")
    method = found.folder / METHOD_STATE
    table.load_state_dict(load_file(method) if method.exists() else {}, found.step)
    return found.step
