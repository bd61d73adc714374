"""One step of training on one process: forward, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from speed_engine.config import RunConfig
from speed_engine.data import Batch
from speed_engine.diffusion_step import ONE_PASS, Losses, Network, evaluator, losses
from speed_engine.engines import Engine, optimizer
from speed_engine.engines.exact_sums import in_tree_order
from speed_engine.models import Passes
from speed_engine.step_table import StepTable
from speed_engine.timesteps.online.policy import Reach
from speed_engine.training.metrics import Meter
from speed_engine.training.replay import Replay


@dataclass(frozen=True)
class DiffusionStep:
    """The step of a run; `assembly.open_step` makes one.

    accumulation: micro-batches of this process in a step. passes: the network's, see
    `speed_engine.models`. exact_sums_of: of `train.exact_sums`, the micro-batches of all processes; else None.
    replay: of `train.replay_every`. graph: see `captured`.
    """

    config: RunConfig
    table: StepTable
    engine: Engine
    backends: Mapping[str, str]
    reach: Reach
    accumulation: int
    meter: Meter
    passes: Passes | None = None
    exact_sums_of: int | None = None
    replay: Replay | None = None
    graph: Callable[..., tuple[Tensor, Tensor]] | None = None

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Make the update that follows `step` finished steps, from the next micro-batches."""
        lr = optimizer.learning_rate(self.config.optim, step)
        if self.graph is not None:
            batch = next(batches)
            noted = self.graph(lr, _by_name(batch))
            self.table.observe(batch.address, *noted)
            self.table.refresh(step + 1, self.reach.all_reduce)
            return
        ordered = self._in_order([next(batches) for _ in range(self.accumulation)])
        if self.replay is not None and self.replay.due(step):
            with self.replay.noting() as noted:
                row_B = self._add_all(ordered, lr)
            totals = (self._losses(batch, self.replay.forward).total for _, batch in ordered)
            self.replay.compare(step, noted, totals)
        else:
            row_B = self._add_all(ordered, lr)
        _, batch = ordered[-1]
        evaluate = evaluator(
            self.table,
            self.engine.forward,
            step,
            seed=self.config.seed,
            dtype=self.engine.compute_dtype,
            backends=self.backends,
        )
        self.table.before_update(step, batch.x0, batch.conditions, row_B, evaluate, self.reach)
        self.engine.step(lr)
        self.table.after_update(step, evaluate, self.reach)
        self.table.refresh(step + 1, self.reach.all_reduce)

    def captured(self) -> DiffusionStep:
        """The same step as one CUDA graph (`engine.cuda_graph`). Raises ValueError for a policy."""
        if self.table.policy is not None:
            raise ValueError(
                f"timesteps.kind={self.config.timesteps.kind} looks at the network between gradients and update, "
                "where one CUDA graph of both has no gap; set engine.cuda_graph=false"
            )

        def gradients(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self.gradients(_from_names(inputs))

        engine: Any = self.engine  # only an engine with the setting `cuda_graph` gets here
        return replace(self, graph=engine.captured(gradients))

    def _in_order(self, batches: list[Batch]) -> list[tuple[int, Batch]]:
        """(the meter's lane, micro-batch) in the order in which gradients are added."""
        if self.exact_sums_of is None:
            return [(0, batch) for batch in batches]
        return in_tree_order(list(enumerate(batches)))

    def _add_all(self, ordered: list[tuple[int, Batch]], lr: float) -> Tensor:
        """The gradients of all micro-batches -> row_B of the last one."""
        *others, (lane, last) = ordered
        for each, batch in others:
            self.add_gradients(batch, each)
            self.engine.step(lr)  # counts the micro-batch, changes nothing
        return self.add_gradients(last, lane)

    def add_gradients(self, batch: Batch, lane: int = 0) -> Tensor:
        """Forward and backward of one micro-batch -> row_B, the rows of the table that it drew."""
        row_B, losses_3B = self.gradients(batch, lane)
        self.table.observe(batch.address, row_B, losses_3B)
        return row_B

    def gradients(self, batch: Batch, lane: int = 0) -> tuple[Tensor, Tensor]:
        """What `add_gradients` does on the device alone -> (row_B, losses_3B of the loss op)."""
        made = self._losses(batch, self.engine.forward)
        self.engine.backward(made.total)
        self.meter.add(made.each_3B, made.row_B, lane)
        return made.row_B, made.each_3B

    def _losses(self, batch: Batch, forward: Network) -> Losses:
        train, seed = self.config.train, self.config.seed
        return losses(
            self.table,
            forward,
            batch,
            seed=seed,
            num_slots=train.global_batch,
            stratified=train.stratified,
            dtype=self.engine.compute_dtype,
            vb_scale=train.vb_scale,
            # Gradients add up to the mean.
            grad_scale=1.0 / (batch.x0.shape[0] * (self.exact_sums_of or self.accumulation)),
            unit_upstream=True,  # both engines call backward on this very scalar
            passes=ONE_PASS if self.passes is None else self.passes(seed, batch.address),
            backends=self.backends,
        )


def _by_name(batch: Batch) -> dict[str, Tensor]:
    """A batch as a captured graph takes it."""
    told = {f"condition {name}": value for name, value in batch.conditions.items()}
    return {"x0": batch.x0, "address": batch.address, **told}


def _from_names(inputs: Mapping[str, Tensor]) -> Batch:
    told = {
        name.removeprefix("condition "): value
        for name, value in inputs.items()
        if name.startswith("condition ")
    }
    return Batch(inputs["x0"], told, inputs["address"])
