"""Builds the providers of a training step, each behind its gate, and says why one is missing or red."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from benchmarks.harness.limit import at_most, rival_seconds
from benchmarks.harness.measure import GateError, Settings, Stopwatch, Unavailable, alternate
from benchmarks.train_step import gate as train_step_gate
from benchmarks.train_step import providers as rivals
from benchmarks.train_step.gate import Outcome
from benchmarks.train_step.memory import OURS, PASSING, PLAIN, pool_bytes, release
from benchmarks.train_step.ours import ours
from benchmarks.train_step.problem import Arena, Problem, State, make_state, shapes_of
from benchmarks.train_step.providers import Trainer
from speed_engine.distributed import Processes

PARTS = (1, 2, 4, 8)  # of a batch, tried in this order where memory ends
WHOLE = 4.0  # compiling a whole network takes about so many times as long as one block
Built = tuple[Trainer, Outcome]


@dataclass
class House:
    """Providers that share one memory, and alternate. `outcomes`: what their gates' steps gave."""

    trainers: dict[str, Trainer] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    red: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        """Let go of all providers."""
        for trainer in self.trainers.values():
            trainer.close()
        self.trainers.clear()


def build_house(
    names: Sequence[str], problem: Problem, processes: Processes, settings: Settings
) -> House:
    """The providers of `names`; those in `trainers` agree with the reference, and it with the definition."""
    house, arena = House(), Arena()
    for name in OURS:  # first, because the others borrow their memory
        if name in names:
            kind = name.removeprefix("ours-")
            _try(
                house,
                name,
                problem,
                lambda kind=kind: _with_outcome(ours(kind, problem, processes), problem),
            )
            optimizer = house.trainers[name].optimizer if name in house.trainers else None
            if optimizer is not None:
                arena.donate(optimizer)
    state = make_state(shapes_of(problem.case), problem.device, arena)
    builders: Mapping[str, Callable[[], Built]] = {
        "reference": lambda: in_parts(lambda n: rivals.reference(problem, state, n), problem),
        "eager": lambda: in_parts(lambda n: rivals.eager(problem, state, n), problem),
        "compile": lambda: best_compiled(problem, state, settings),
    }
    for name in PLAIN:
        if name in names:
            _try(house, name, problem, builders[name])
    _judge(house, problem, state)
    house.trainers = {
        name: house.trainers[name]
        for name in names
        if name in house.trainers and name not in house.red
    }
    return house


def _with_outcome(trainer: Trainer, problem: Problem) -> Built:
    return trainer, train_step_gate.run(problem, trainer)


def _try(house: House, name: str, problem: Problem, build: Callable[[], Built]) -> None:
    """Build one provider into the house, or note why not."""
    before = pool_bytes(problem.device)
    try:
        with at_most(float("inf") if name in (*OURS, "reference") else rival_seconds()):
            trainer, outcome = build()
        trainer.facts["graph_pool_bytes"] = pool_bytes(problem.device) - before
        house.trainers[name], house.outcomes[name] = trainer, outcome
    except Unavailable as reason:
        house.missing[name] = str(reason)
    except GateError as error:
        house.red[name] = str(error)
    except torch.OutOfMemoryError:
        house.missing[name] = "out of memory"
    except Exception as error:  # ours is to be mended, a rival's failure is its own
        told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        (house.red if name in OURS else house.missing)[name] = told
    release(problem.device)


def _judge(house: House, problem: Problem, state: State) -> None:
    """Fill `red`: the reference by the definition, everybody else by the reference."""
    others = [name for name in house.trainers if name != "reference"]
    if "reference" in house.trainers:
        state.reset()
        expected = train_step_gate.expected_loss(problem, state.weights)
        try:
            train_step_gate.judge_reference(house.outcomes["reference"], expected)
        except GateError as error:
            house.red["reference"] = str(error)
        else:
            house.red |= train_step_gate.agree(
                house.outcomes, others, lambda: rounded_eager(problem, state)
            )
            return
    house.red |= dict.fromkeys(others, "there is no green reference to be held against")


def rounded_eager(problem: Problem, state: State) -> Outcome:
    """The gate's steps of eager from weights rounded to bfloat16."""

    def build(parts: int) -> Trainer:  # a new optimizer's counters are zero already
        trainer = rivals.eager(problem, state, parts)
        return replace(trainer, reset=lambda: state.reset(rounded=True))

    return in_parts(build, problem)[1]


def in_parts(build: Callable[[int], Trainer], problem: Problem) -> Built:
    """The provider with the batch in as few parts as memory allows. Raises Unavailable."""
    for parts in PARTS:
        if problem.case.batch % parts:
            break
        with contextlib.suppress(torch.OutOfMemoryError):
            return _with_outcome(build(parts), problem)
        release(problem.device)
    raise Unavailable("out of memory, in parts of the batch too")


def best_compiled(problem: Problem, state: State, settings: Settings) -> Built:
    """torch.compile in the mode that a short trial finds fastest; BENCH_COMPILE_SECONDS limits the trials.

    The first mode is tried whatever it takes, unless the limit is 0. Raises Unavailable.
    """
    limit = float(os.environ.get("BENCH_COMPILE_SECONDS", "inf"))
    if limit <= 0:
        raise Unavailable("not tried: BENCH_COMPILE_SECONDS is 0")
    built: dict[str, Built] = {}
    failed: dict[str, str] = {}
    begin, expected = time.perf_counter(), 0.0  # seconds that the next mode may take
    modes = rivals.COMPILE_MODES[problem.device.type]
    for mode in modes[:1] if settings.quick else modes:
        started = time.perf_counter()
        if started - begin + expected > limit and built:
            failed[mode] = "not tried: the time for compiling was over"
            continue
        if mode == "reduce-overhead" and not _has_room_for_graphs(problem):
            failed[mode] = "not tried: its CUDA graphs would keep a fourth of the device's memory"
            continue
        try:
            built[mode] = in_parts(
                lambda parts, mode=mode: rivals.compiled(problem, state, mode, parts), problem
            )
        except Unavailable as reason:
            failed[mode] = str(reason)
        except Exception as error:  # whatever a compiler throws: the report says so
            failed[mode] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        took = time.perf_counter() - started
        expected = WHOLE * took if mode == "blocks" else max(expected, took)
    if not built:
        raise Unavailable(f"torch.compile failed in every mode: {failed}")
    best = next(iter(built))
    if len(built) > 1:
        steps = {mode: trainer.step for mode, (trainer, _) in built.items()}
        trial = alternate(steps, Stopwatch(problem.device), 3.0, 3, 10, warmups=2)
        best = min(trial, key=lambda mode: statistics.median(trial[mode]))
    trainer, outcome = built[best]
    trainer.facts["compile_modes_tried"] = list(built)
    if failed:
        trainer.facts["compile_failed"] = failed
    return trainer, outcome


def _has_room_for_graphs(problem: Problem) -> bool:
    kept = PASSING["cuda"][0][1] * problem.case.work.elements
    return kept < 0.25 * torch.cuda.get_device_properties(problem.device).total_memory
