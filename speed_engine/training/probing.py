"""Lets a sample-wise policy (`timesteps: adaptive`) see the network before and after an update.
Nothing for other methods.

    before_update(table, step, batch..., forward=...)      # the gradients are ready
    engine.step()
    after_update(table, step, forward=...)

`forward(x_t, tau_B, labels)` is the network as it trains, the same number of calls on every rank.
The noise of an evaluation is a function of the step and of the place in the evaluation, so both
calls see the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speed_engine.step_table import StepTable
from speed_engine.timesteps.online.policy import ALONE, Evaluate, Reach

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# Training and probing never share a key of the random generator.
PROBE_KEY = 0x5EED_0F_9B0BE


def before_update(
    table: StepTable,
    step: int,
    x0: Tensor,
    labels: Tensor | None,
    row_B: Tensor,
    *,
    forward: Forward,
    seed: int,
    reach: Reach = ALONE,
    dtype: torch.dtype | None = None,
    backends: dict[str, str] | None = None,
) -> None:
    """Call with `step` finished steps, before the optimizer's step that follows; every rank alike.

    x0, labels and row_B are the last micro-batch of the update; `backends` maps "noise" and "loss"
    to a word.
    """
    if table.policy is not None and table.policy.due(step):
        evaluate = _evaluator(table, step, forward, seed, dtype, backends or {})
        table.policy.before(step, x0, labels, row_B, evaluate, reach)


def after_update(
    table: StepTable,
    step: int,
    *,
    forward: Forward,
    seed: int,
    reach: Reach = ALONE,
    dtype: torch.dtype | None = None,
    backends: dict[str, str] | None = None,
) -> None:
    """Call after the optimizer's step, with the same `step` as `before_update`; every rank alike."""
    if table.policy is not None and table.policy.due(step):
        evaluate = _evaluator(table, step, forward, seed, dtype, backends or {})
        table.policy.after(evaluate, reach)


def _evaluator(
    table: StepTable,
    step: int,
    forward: Forward,
    seed: int,
    dtype: torch.dtype | None,
    backends: dict[str, str],
) -> Evaluate:
    probe_seed = seed ^ PROBE_KEY

    @torch.no_grad()
    def evaluate(x0: Tensor, labels: Tensor | None, row_N: Tensor, first_slot: int) -> Tensor:
        address_2 = torch.empty(2, dtype=torch.int64, device=x0.device)
        address_2[0].fill_(step)
        address_2[1].fill_(first_slot)
        options: dict[str, Any] = {"seed": probe_seed}
        x_t, used_N, tau_N = table.noise_at(
            x0, row_N, address_2, dtype=dtype, backend=backends.get("noise", "auto"), **options
        )
        out = forward(x_t, tau_N, labels)
        _, losses_3N = table.loss(
            out, x0, used_N, address_2, backend=backends.get("loss", "auto"), **options
        )
        return losses_3N[1]

    return evaluate
