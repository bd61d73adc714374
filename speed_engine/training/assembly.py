"""From a configuration to the parts of a run. The loop, the benchmarks and the tests all come through here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from speed_kernels.contract import FILES, BackendError, Choice, choose
from torch import nn

from speed_engine import kinds
from speed_engine.conditions import Condition
from speed_engine.config import RunConfig
from speed_engine.data import ConditionFacts, Facts, Source, resident
from speed_engine.data.loader import Loader
from speed_engine.data.split import split
from speed_engine.distributed import Processes
from speed_engine.engines import Engine, with_precision
from speed_engine.engines.exact_sums import refuse_what_has_no_tree
from speed_engine.models import refuse_unknown_conditions
from speed_engine.step_table import StepTable, build_step_table
from speed_engine.timesteps.online.policy import Reach
from speed_engine.training.attention import agree_on_attention
from speed_engine.training.metrics import Meter
from speed_engine.training.replay import Replay
from speed_engine.training.spikes import Bins
from speed_engine.training.step import DiffusionStep

OPS = ("noise", "loss", "adamw_ema")  # of every training step


@dataclass(frozen=True)
class Parts:
    """Everything of a run but its engine. Nothing is written yet.

    config: with the conditions' settings filled in. source: what training reads. held_out: what it never reads, where
    `validation.every` asks for it. facts: what the network is told of the data. feed: where the loader reads the
    samples, and why.
    """

    config: RunConfig
    processes: Processes
    source: Source
    held_out: Source | None
    facts: Facts
    conditions: dict[str, Condition]
    choices: list[Choice]
    model: nn.Module
    table: StepTable
    loader: Loader
    feed: str

    @property
    def backends(self) -> dict[str, str]:
        """Op -> backend."""
        return {choice.op: choice.backend for choice in self.choices}


def build(
    config: RunConfig,
    processes: Processes,
    source: Source | None = None,
    model: nn.Module | None = None,
) -> Parts:
    """The parts of the run. Collective. Raises ValueError: one sentence for a user's mistake.

    source, model: instead of those that the configuration names.
    """
    micro_batch, _ = split_batch(config, processes.world)
    if config.train.exact_sums:
        _refuse_inexact(config, processes.world, processes.device.type == "cuda")
    optim = config.optim.in_updates(config.train.global_batch)
    engine = with_precision(config.engine, processes.device, optim.name)
    config = config.model_copy(update={"engine": engine, "optim": optim})
    choices = agreed_kernels(config, processes)
    backends = {choice.op: choice.backend for choice in choices}
    source = build_source(config) if source is None else source
    source, held_out = parted(config, source)
    config, conditions, facts = told(config, source.facts)
    network = model or build_model(config, facts, processes.device, backends)
    if config.train.exact_sums and hasattr(network, "same_anywhere"):
        network.same_anywhere = True  # pyright: ignore[reportArgumentType]
    agree_on_attention(network, processes)
    residence = resident.choose(
        source,
        config.train.resident,
        flip=config.train.flip,
        device=processes.device,
        world=processes.world,
    )
    loader = Loader(
        residence.source,
        conditions,
        config.seed,
        config.train.global_batch,
        micro_batch,
        config.train.flip,
        processes,
        backends["noise"],
        torch.bfloat16 if config.train.latents == "bf16" else torch.float32,
    )
    table = build_table(config).to(processes.device)
    if config.train.exact_sums and table.changes:
        raise ValueError(
            f"train.exact_sums=true cannot add up what timesteps.kind={config.timesteps.kind} learns from all "
            "processes; choose a kind that does not learn"
        )
    return Parts(
        config,
        processes,
        source,
        held_out,
        facts,
        conditions,
        choices,
        network,
        table,
        loader,
        residence.reason,
    )


def open_engine(parts: Parts) -> Engine:
    """The engine around the model. Collective."""
    config = parts.config
    micro_batch, accumulation = split_batch(config, parts.processes.world)
    # Outside engines need not know of it.
    more = {"exact_sums": True} if config.train.exact_sums else {}
    return kinds.find("engine", config.engine.kind).open_engine(
        config.engine,
        parts.model,
        config.optim,
        parts.processes,
        micro_batch=micro_batch,
        accumulation=accumulation,
        backend=parts.backends["adamw_ema"],
        **more,
    )


def open_step(parts: Parts, engine: Engine) -> DiffusionStep:
    """The training step, its table started; a CUDA graph still has to be asked for (`captured`)."""
    config, processes = parts.config, parts.processes
    parts.table.start(config.train.global_batch, parts.facts.shape)
    accumulation = split_batch(config, processes.world)[1]
    exact = config.train.exact_sums
    return DiffusionStep(
        config,
        parts.table,
        engine,
        parts.backends,
        Reach(processes.rank, processes.world, processes.all_reduce()),
        accumulation,
        _meter(parts, accumulation if exact else 1),
        getattr(parts.model, "passes", None),
        accumulation * processes.world if exact else None,
        _replay(config, engine, processes),
    )


def _meter(parts: Parts, lanes: int) -> Meter:
    table, device, bins = parts.table, parts.processes.device, None
    if parts.config.train.spike_sigmas:
        bins = Bins(table.schedule.log_snr, lanes, device)
    return Meter(device, table.num_rows, lanes, bins)


def _replay(config: RunConfig, engine: Engine, processes: Processes) -> Replay | None:
    """What `train.replay_every` asks for. Raises ValueError for an engine whose step cannot be computed twice."""
    if not config.train.replay_every:
        return None
    alone = getattr(engine, "alone", None)
    found = None if alone is None or getattr(config.engine, "cuda_graph", False) else alone()
    if found is None:
        raise ValueError(
            f"train.replay_every={config.train.replay_every} computes a gradient beside the engine, which "
            f"engine.kind={config.engine.kind} allows neither in a CUDA graph nor with parameters cut by ZeRO 3; set "
            "engine.cuda_graph=false, or engine.zero to 2 or less, or train.replay_every=0"
        )
    module, forward = found
    return Replay(config.train.replay_every, module, forward, processes)


# ---------------------------------------------------------------------------------------------- one part each


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


def _refuse_inexact(config: RunConfig, world: int, on_gpu: bool) -> None:
    """Raise ValueError, with the cure, for settings under which `train.exact_sums` could not keep its word."""
    if config.engine.kind != "torch":
        raise ValueError(
            f"train.exact_sums=true adds up gradients by itself, which engine.kind={config.engine.kind} does in its "
            "own order; set engine.kind=torch"
        )
    if config.engine.cuda_graph:
        raise ValueError(
            "train.exact_sums=true adds up gradients outside of a captured step; set engine.cuda_graph=false"
        )
    if on_gpu and getattr(config.model, "attention", "") == "auto":
        raise ValueError(
            "train.exact_sums=true needs an attention that is not chosen by its speed, which differs from start to "
            "start; set model.attention=sdpa_efficient, or another that does not measure"
        )
    refuse_what_has_no_tree(config.train.global_batch, config.train.micro_batch, world)


def build_source(config: RunConfig) -> Source:
    """The data. Raises ValueError (DataError) naming the file and the cure, or the missing part of the contract."""
    source = kinds.find("data", config.data.kind).build(config.data)
    parts = ("facts", "fingerprint", "__len__", "read", "decode")
    lacking = [name for name in parts if not hasattr(source, name)]
    if not lacking and not isinstance(source.facts, Facts):
        lacking = ["facts of the type speed_engine.data.Facts"]
    if lacking:
        raise ValueError(
            f"data.kind={config.data.kind}: what its build returns has no {lacking[0]}; "
            "speed_engine/data/__init__.py says what a Source offers"
        )
    return source


def parted(config: RunConfig, source: Source) -> tuple[Source, Source | None]:
    """(what training reads, what validation reads). Raises ValueError for a cadence or a size that cannot be."""
    every, log_every = config.validation.every, config.log.every
    if not every:
        return source, None
    if every % log_every:
        raise ValueError(
            f"validation.every={every} is no multiple of log.every={log_every}, with whose lines it is written; "
            f"choose {max(1, round(every / log_every)) * log_every}"
        )
    return split(source, config.validation.samples)


def told(config: RunConfig, data: Facts) -> tuple[RunConfig, dict[str, Condition], Facts]:
    """What the network is told of the data: (config with every condition's settings and the schedule for samples of
    this shape, conditions by name, facts).

    A condition of the data that the configuration does not name gets its kind's defaults; `null` leaves it out; one
    that is made from the samples is there if it is named. Raises ValueError where configuration, data and model
    contradict each other.
    """
    data = data.with_conditions({**data.conditions, **_made(config, data)})
    for name, section in config.conditions.items():
        if section is not None and name not in data.conditions:
            there = ", ".join(data.conditions) or "none"
            raise ValueError(
                f"conditions.{name}: the data hold no such condition (they hold: {there}); set "
                f"conditions.{name}=null, or encode the data with it"
            )
    for name, facts in data.conditions.items():
        if "." in facts.kind and name not in config.conditions:  # data may come from anybody
            raise ValueError(
                f"the data name the outside module {facts.kind} for the condition {name}; "
                f"if it is yours, say so: conditions.{name}.kind={facts.kind}"
            )
    wanted = {
        name: facts
        for name, facts in data.conditions.items()
        if name not in config.conditions or config.conditions[name] is not None
    }
    module = kinds.find("model", config.model.kind)
    refuse_unknown_conditions(module, data.with_conditions(wanted), config.model.kind)
    settings = {
        name: config.conditions[name]
        if name in config.conditions
        else kinds.config_of("conditions", facts.kind)
        for name, facts in data.conditions.items()
    }
    conditions: dict[str, Condition] = {
        name: kinds.find("conditions", section.kind).build(section, name, data.conditions[name])
        for name, section in settings.items()
        if section is not None
    }
    facts = data.with_conditions({name: each.facts for name, each in conditions.items()})
    # A schedule may depend on the shape of a sample (rectified flow's shift).
    schedule = config.schedule
    if for_shape := getattr(schedule, "for_shape", None):
        schedule = for_shape(facts.shape)
    config = config.model_copy(update={"conditions": settings, "schedule": schedule})
    return config, conditions, facts


def _made(config: RunConfig, data: Facts) -> dict[str, ConditionFacts]:
    """The conditions that no data hold and that are made from samples, as far as the configuration names them."""
    found: dict[str, ConditionFacts] = {}
    for name, section in config.conditions.items():
        if section is not None and name not in data.conditions:
            module = kinds.find("conditions", section.kind)
            if hasattr(module, "made"):
                found[name] = module.made(section, name, data)
    return found


def build_table(config: RunConfig) -> StepTable:
    """The step table, on the host."""
    return build_step_table(
        config.schedule, config.objective, config.timesteps, config.learned_variance
    )


def choose_kernels(config: RunConfig, device: torch.device) -> list[Choice]:
    """The backend of every op of a training step, the network's own ops included.

    Raises speed_kernels.contract.BackendError where one that was asked for cannot run.
    """
    ops = OPS + getattr(kinds.find("model", config.model.kind), "KERNELS", ())
    kernels = config.kernels
    return [choose(op, device, kernels.backend, kernels.strict) for op in ops]


def agreed_kernels(config: RunConfig, processes: Processes) -> list[Choice]:
    """`choose_kernels`, the same on all processes: of each op the best backend that all of them have. Collective.

    Raises BackendError on all processes where one of them has none, or where `kernels.strict` forbids what remains.
    """
    refusal, choices = None, []
    try:
        choices = choose_kernels(config, processes.device)
    except BackendError as error:
        refusal = error
    if processes.any(refusal is not None):
        raise refusal or BackendError(
            "another process cannot run the kernels; its message is above"
        )
    agreed = []
    for choice in choices:
        word = [word for word in FILES if processes.any(choice.backend == word)][-1]
        if processes.any(config.kernels.strict and choice.backend != word):
            raise BackendError(
                f"kernels.strict forbids a fallback for {choice.op}: one process has only {word}"
            )
        if word != choice.backend:
            choice = Choice(
                choice.op, word, f"all that every process has; here {choice.backend}", True
            )
        agreed.append(choice)
    return agreed


def num_outputs(config: RunConfig, facts: Facts) -> int:
    """Channels of the network's output: those of a sample, twice with a learned variance."""
    return facts.shape[0] * (1 + config.learned_variance)


def build_model(
    config: RunConfig,
    facts: Facts,
    device: torch.device | str = "cpu",
    backends: Mapping[str, str] | None = None,
) -> nn.Module:
    """The freshly initialised network; on the device `meta` it takes no memory.

    facts: as `told` gives them. backends: op -> backend for the network's fused kernels; None:
    plain torch.
    """
    engine = with_precision(config.engine, torch.device(device), config.optim.name)
    precision = getattr(engine, "precision", "fp32")
    return kinds.find("model", config.model.kind).build(
        config.model,
        facts,
        num_outputs(config, facts),
        seed=config.seed,
        device=device,
        dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        backends=backends,
    )


def macs_per_sample(config: RunConfig, facts: Facts, *, training: bool = False) -> int:
    """Multiply-adds of one forward pass of one sample; training: of all that a step puts it through."""
    module = kinds.find("model", config.model.kind)
    count = module.macs_per_sample
    if training:
        count = getattr(module, "training_macs_per_sample", count)
    return count(config.model, facts, num_outputs(config, facts))
