"""The training loss for somebody else's loop: draw, noise, predict and compare in one call.

    table = StepTable.from_alphas_cumprod(scheduler.alphas_cumprod, timesteps="speed").to("cuda")
    loss = diffusion_loss(model, x0, table, step=step, seed=0)

Methods that learn from the losses work here too: the call observes them and refreshes the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from speed_engine.step_table import StepTable


def diffusion_loss(
    model: Callable[..., Any],
    x0: Tensor,
    table: StepTable,
    *,
    step: int,
    seed: int,
    labels: Tensor | None = None,
    model_kwargs: dict[str, Any] | None = None,
    first_slot: int | None = None,
    num_slots: int | None = None,
    stratified: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The loss of one batch, a scalar to call backward on.

    `model(x_t, tau_B[, labels], **model_kwargs)` returns a tensor like x0 (twice its channels with
    a learned variance), or an object that has it as `.sample`. `step` and `seed` decide every
    random number: count the step up. `first_slot` and `num_slots` place this batch in the global
    batch; by default the ranks of torch.distributed follow each other. Raises ValueError where the
    table's method needs the engine's loop (`adaptive`).
    """
    if table.policy is not None:
        raise ValueError(
            "timesteps.kind=adaptive has to see the network before and after every update, which "
            "diffusion_loss cannot; train with the engine, or choose infonoise"
        )
    batch = x0.shape[0]
    spread = distributed.is_available() and distributed.is_initialized()
    if first_slot is None or num_slots is None:
        first_slot = batch * (distributed.get_rank() if spread else 0)
        num_slots = batch * (distributed.get_world_size() if spread else 1)
    if table.changes:
        if table.session is None:
            table.start(num_slots)
        table.refresh(step, distributed.all_reduce if spread else None)
    address_2 = torch.empty(2, dtype=torch.int64, device=x0.device)
    address_2[0].fill_(step)  # fill_ takes the number as a kernel's argument: no copy, no wait
    address_2[1].fill_(first_slot)
    x_t, row_B, tau_B = table.noise(
        x0, address_2, seed=seed, num_slots=num_slots, stratified=stratified, backend=backend
    )
    arguments = (x_t, tau_B) if labels is None else (x_t, tau_B, labels)
    out = model(*arguments, **(model_kwargs or {}))
    out = out if isinstance(out, Tensor) else out.sample
    total, losses_3B = table.loss(out, x0, row_B, address_2, seed=seed, backend=backend)
    table.observe(address_2, row_B, losses_3B)
    return total
