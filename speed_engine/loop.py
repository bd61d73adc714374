"""The training loop: one readable function. Everything it calls can be read alone.

The step is: a batch by address, `noise` (draws t, mixes the noise in), the network, `loss` (losses and the gradient in
one pass), the engine's update. Nothing in it waits for the device; once an interval the sums are read.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from pathlib import Path
from typing import Any

import torch
from speed_kernels.contract import Choice, choose

from speed_engine import checkpoint, optim, telemetry
from speed_engine.config import RunConfig, kind_module
from speed_engine.feed import Feed
from speed_engine.interrupt import Interrupt
from speed_engine.processes import Processes, start, stop
from speed_engine.step_table import build_step_table

STOP_EVERY = 10  # steps between two agreements of many processes on whether to stop
# What may differ between a run and its continuation; everything else changes the result.
FREE_TO_CHANGE = {"run_dir", "log", "checkpoint", "kernels"}

DONE, NOT_FINITE = 0, 3


def train(config: RunConfig) -> int:
    """Train as `config` says, continuing what its run folder holds. Returns the exit code.

    0: done, or stopped on request with a checkpoint. 3: the loss was not finite for too long.
    Raises ValueError (a user's mistake, in one sentence) or CheckpointError.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    processes = start(getattr(config.engine, "device", "auto"))
    try:
        return _train(config, processes)
    finally:
        stop()


def _train(config: RunConfig, processes: Processes) -> int:
    micro_batch, accumulation = split_batch(config, processes.world)
    choices = [
        choose(op, processes.device, config.kernels.backend, config.kernels.strict)
        for op in ("noise", "loss", "adamw_ema")
    ]
    backends = {choice.op: choice.backend for choice in choices}
    run = Path(config.run_dir)
    run.mkdir(parents=True, exist_ok=True)
    held = checkpoint.lock(run) if processes.first else None
    source = kind_module("data", config.data.kind).build(config.data)  # type: ignore[attr-defined]
    model = build_model(config, source.shape, source.num_classes)
    table = build_step_table(
        config.schedule, config.objective, config.timesteps, config.learned_variance
    ).to(processes.device)
    engine = kind_module("engine", config.engine.kind).open_engine(  # type: ignore[attr-defined]
        config.engine,
        model,
        config.optim,
        processes,
        micro_batch=micro_batch,
        accumulation=accumulation,
        backend=backends["adamw_ema"],
    )
    manifest = describe(config, processes, source, model, choices, engine.facts())
    first_step = resume(config, run, processes, engine, manifest)
    feed = Feed(
        source,
        config.seed,
        config.train.global_batch,
        micro_batch,
        model.null_label,
        getattr(config.model, "label_dropout", 0.0),
        processes,
    )
    journal = None
    if processes.first:
        checkpoint.write_json(run / "manifest.json", manifest)
        journal = telemetry.Journal(
            run, first_step, config.train.steps, config.log.tensorboard, config.log.wandb
        )
        for choice in choices:
            mark = "WARNING, slower: " if choice.fallback else ""
            journal.say(f"{mark}{choice.op}: {choice.backend} ({choice.reason})")
        if first_step >= config.train.steps:
            journal.say(f"nothing to do: {run} has already made {first_step} steps")

    def save(step: int) -> None:
        def write(folder: Path) -> None:
            engine.save(folder)
            for name in ("model", "ema"):
                weights = engine.weights(ema=name == "ema")
                if weights is not None:
                    save_weights(folder / f"{name}.safetensors", weights, manifest, step)

        checkpoint.save(run, step, processes, write, manifest, config.checkpoint.keep)

    meter = telemetry.Meter(processes.device, table.num_rows)
    macs = kind_module("model", config.model.kind).macs_per_sample(  # type: ignore[attr-defined]
        config.model, **model_facts(config, source.shape, source.num_classes)
    )
    step, saved, skipped = first_step, first_step, engine.num_skipped()
    clock, clock_step = time.monotonic(), step
    code = DONE
    with Interrupt() as interrupt:
        for number, batch in enumerate(feed.batches(first_step, config.train.steps)):
            x_t, row_B, tau_B = table.noise(
                batch.x0,
                batch.address,
                seed=config.seed,
                num_slots=config.train.global_batch,
                stratified=config.train.stratified,
                dtype=engine.compute_dtype,
                backend=backends["noise"],
            )
            out = engine.forward(x_t, tau_B, batch.labels)
            loss, losses_3B = table.loss(
                out,
                batch.x0,
                row_B,
                batch.address,
                seed=config.seed,
                vb_scale=config.train.vb_scale,
                grad_scale=1.0 / (micro_batch * accumulation),
                unit_upstream=True,
                backend=backends["loss"],
            )
            engine.backward(loss)
            engine.step(optim.learning_rate(config.optim, step))
            meter.add(losses_3B, row_B)
            if (number + 1) % accumulation:
                continue
            step += 1
            if journal:
                journal.advance(step)
            last = step == config.train.steps
            if step % config.log.every == 0 or last:
                seconds, clock = time.monotonic() - clock, time.monotonic()
                line = meter.read(processes)
                bad, skipped = engine.num_skipped() - skipped, engine.num_skipped()
                images = (step - clock_step) * config.train.global_batch / seconds
                clock_step = step
                tflops = 6e-12 * macs * images / processes.world
                line |= {
                    "step": step,
                    "images": step * config.train.global_batch,
                    "lr": optim.learning_rate(config.optim, step - 1),
                    "images_per_s": images,
                    "tflops_per_device": tflops,
                    "mfu": telemetry.mfu(tflops, processes.device),
                    "skipped_steps": skipped,
                }
                if journal:
                    journal.write(line)
                if bad >= min(config.train.max_bad_steps, config.log.every):
                    code = NOT_FINITE
                    break
            if last or step % config.checkpoint.every == 0:
                save(step)
                saved = step
            agreed = interrupt.requested
            if processes.world > 1:
                agreed = step % STOP_EVERY == 0 and processes.any(interrupt.requested)
            if agreed:
                if saved != step:
                    save(step)
                if journal:
                    journal.say(f"stopped on request; step {step} is saved in {run}")
                break
    if journal:
        journal.close()
        if code == NOT_FINITE:
            journal.say(
                f"stopped at step {step}: {bad} of the last {config.log.every} updates had gradients "
                f"that are not finite; lower optim.lr or set optim.clip, then resume from {run}"
            )
    if held is not None:
        held.close()
    return code


def split_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """(micro batch, accumulation) of each process. Raises ValueError if the global batch does not
    divide."""
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


def build_model(config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> Any:
    """The freshly initialised network of the configuration, on the host."""
    module = kind_module("model", config.model.kind)  # type: ignore[attr-defined]
    return module.build(config.model, **model_facts(config, shape, num_classes), seed=config.seed)


def save_weights(
    path: Path, weights: dict[str, torch.Tensor], manifest: dict[str, Any], step: int
) -> None:
    """Weights as safetensors, with everything needed to build the model again in the metadata."""
    from speed_engine import exchange

    exchange.save_weights(path, weights, {"step": step, **_portable(manifest)})


def _portable(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("config", "data")}


def describe(
    config: RunConfig,
    processes: Processes,
    source: Any,
    model: torch.nn.Module,
    choices: list[Choice],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The run's manifest: everything that was decided."""
    device = processes.device
    return {
        "config": config.model_dump(mode="json"),
        "data": {
            "shape": list(source.shape),
            "num_classes": source.num_classes,
            "num_samples": len(source),
            "fingerprint": source.fingerprint,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "kernels": [dataclasses.asdict(choice) for choice in choices],
        "attention": dataclasses.asdict(model.attention_choice)
        if hasattr(model, "attention_choice")
        else None,
        "processes": processes.world,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **facts,
    }


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
    changed = checkpoint.differences(comparable(found.manifest), comparable(manifest))
    if changed:
        raise checkpoint.CheckpointError(
            f"{run} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another run_dir, or go back to the old values"
        )
    engine.load(found.folder)
    return found.step


def comparable(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that must be equal for a resume to continue the same run."""
    config = {k: v for k, v in manifest["config"].items() if k not in FREE_TO_CHANGE}
    config["train"] = {k: v for k, v in config["train"].items() if k != "steps"}
    config["data"] = manifest["data"]["fingerprint"]  # wherever the files are now
    result = {"config": config}
    if manifest["config"]["engine"]["kind"] == "deepspeed":  # ZeRO's shards fit one world size
        result["processes"] = manifest["processes"]
    return result
