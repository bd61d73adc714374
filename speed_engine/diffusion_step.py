"""The diffusion step: draw, noise, predict and compare; `diffusion_loss` is it for somebody else's training loop.

    table = StepTable.from_alphas_cumprod(scheduler.alphas_cumprod, timesteps="speed").to("cuda")
    loss = diffusion_loss(model, x0, table, step=step, seed=0)

Methods that learn from the losses work in a foreign loop too: the call observes them and refreshes the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from speed_engine.data import Batch
from speed_engine.step_table import StepTable
from speed_engine.timesteps.online.policy import Evaluate

# network(x_t, time_B, **conditions) -> prediction
Network = Callable[..., Tensor]
ONE_PASS: Sequence[tuple[float, dict[str, Tensor]]] = ((1.0, {}),)
AUTO: Mapping[str, str] = {"noise": "auto", "loss": "auto"}
# An evaluation and training never share a key of the random generator.
EVALUATION_KEY = 0x5EED_0F_9B0BE


@dataclass(frozen=True)
class Losses:
    """What one batch came to."""

    total: Tensor  # scalar, differentiable: grad_scale times the sum over the samples
    each_3B: (
        Tensor  # float32 [3, B]: total, unweighted mean squared error, variational term in bits
    )
    row_B: Tensor  # int64 [B]: the table's rows that were used


def losses(
    table: StepTable,
    network: Network,
    batch: Batch,
    *,
    seed: int,
    num_slots: int,
    row_B: Tensor | None = None,
    stratified: bool = True,
    dtype: torch.dtype | None = None,
    vb_scale: float = 1.0,
    grad_scale: float | None = None,
    unit_upstream: bool = False,
    passes: Sequence[tuple[float, dict[str, Tensor]]] = ONE_PASS,
    backends: Mapping[str, str] = AUTO,
) -> Losses:
    """Put a batch through the network once (or in `passes`) and compare.

    num_slots: the global batch. row_B: int64 [B], rows that somebody else chose; None draws them.
    dtype: of x_t. grad_scale, unit_upstream, vb_scale: see `StepTable.loss`. passes: (share of the
    loss, further keywords of the network), see `speed_engine.models`. backends: of the two ops.
    """
    options: dict[str, Any] = {"seed": seed, "dtype": dtype, "backend": backends["noise"]}
    if row_B is None:
        x_t, row_B, time_B = table.noise(
            batch.x0, batch.address, num_slots=num_slots, stratified=stratified, **options
        )
    else:
        x_t, row_B, time_B = table.noise_at(batch.x0, row_B, batch.address, **options)
    scale = 1 / batch.x0.shape[0] if grad_scale is None else grad_scale
    totals, each = [], []
    for share, further in passes:
        out = network(x_t, time_B, **batch.conditions, **further)
        out = out if isinstance(out, Tensor) else _sample_of(out)
        total, losses_3B = table.loss(
            out,
            batch.x0,
            row_B,
            batch.address,
            seed=seed,
            vb_scale=vb_scale,
            grad_scale=scale * share,
            unit_upstream=unit_upstream,
            backend=backends["loss"],
        )
        totals.append(total)
        each.append(losses_3B if share == 1 else losses_3B * share)
    if len(passes) == 1:
        return Losses(totals[0], each[0], row_B)
    return Losses(torch.stack(totals).sum(), torch.stack(each).sum(0), row_B)


def evaluator(
    table: StepTable,
    network: Network,
    step: int,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    backends: Mapping[str, str] = AUTO,
) -> Evaluate:
    """The network's unweighted error at given rows, without gradients, as a policy asks for it.

    The noise is a function of `step` and of the place in the evaluation, so that two evaluations
    compare equal draws.
    """

    @torch.no_grad()
    def evaluate(
        x0: Tensor, conditions: Mapping[str, Tensor], row_N: Tensor, first_slot: int
    ) -> Tensor:
        batch = Batch(x0, dict(conditions), address(step, first_slot, x0.device))
        made = losses(
            table,
            network,
            batch,
            seed=seed ^ EVALUATION_KEY,
            num_slots=x0.shape[0],
            row_B=row_N,
            dtype=dtype,
            backends=backends,
        )
        return made.each_3B[1]

    return evaluate


def address(step: int, first_slot: int, device: torch.device) -> Tensor:
    """int64 [2]: (step, first global slot), made on the device without a copy or a wait."""
    if device.type == "cpu":
        return torch.tensor((step, first_slot))
    address_2 = torch.empty(2, dtype=torch.int64, device=device)
    address_2[0].fill_(step)  # fill_ takes the number as a kernel's argument
    address_2[1].fill_(first_slot)
    return address_2


def diffusion_loss(
    model: Callable[..., Any],
    x0: Tensor,
    table: StepTable,
    *,
    step: int,
    seed: int,
    conditions: Mapping[str, Any] | None = None,
    first_slot: int | None = None,
    num_slots: int | None = None,
    stratified: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The loss of one batch, a scalar to call backward on.

    `model(x_t, time_B, **conditions)` returns a tensor like x0 (twice its channels with a learned
    variance), or an object that has it as `.sample`, or a tuple that begins with it. `step` and
    `seed` decide every random number: count the step up. `first_slot` and `num_slots`, both or
    neither, place this batch in the global batch; by default the ranks of torch.distributed follow
    each other. Raises ValueError for one of the two alone, for a place outside the global batch, and
    where the table's method needs the engine's loop (`adaptive`).
    """
    if not isinstance(x0, Tensor) or not isinstance(table, StepTable):
        raise ValueError(
            f"diffusion_loss takes x0, a tensor [B, ...], and table, a StepTable; it was given a {type(x0).__name__} "
            f"and a {type(table).__name__}"
        )
    if not x0.dim() or not len(x0):
        raise ValueError("x0 holds no sample; give a batch of at least one: [B, ...]")
    if table.policy is not None:
        raise ValueError(
            "timesteps.kind=adaptive has to see the network before and after every update, which "
            "diffusion_loss cannot; train with the engine, or choose infonoise"
        )
    size = x0.shape[0]
    spread = distributed.is_available() and distributed.is_initialized()
    if first_slot is None and num_slots is None:
        first_slot = size * (distributed.get_rank() if spread else 0)
        num_slots = size * (distributed.get_world_size() if spread else 1)
    if first_slot is None or num_slots is None:
        alone, other = ("num_slots", "first_slot")[:: 1 if first_slot is None else -1]
        raise ValueError(
            f"diffusion_loss was given {alone} without {other}; give both, the global batch and this batch's place in "
            "it, or neither"
        )
    if not 0 <= first_slot <= num_slots - size:
        raise ValueError(
            f"diffusion_loss was given first_slot={first_slot} and num_slots={num_slots}, which has no place for "
            f"{size} samples; num_slots is the global batch, over all micro-batches and ranks"
        )
    if table.changes:
        if table.session is None:
            table.start(num_slots)
        table.refresh(step, distributed.all_reduce if spread else None)
    address_2 = address(step, first_slot, x0.device)
    made = losses(
        table,
        model,
        Batch(x0, dict(conditions or {}), address_2),
        seed=seed,
        num_slots=num_slots,
        stratified=stratified,
        backends={"noise": backend, "loss": backend},
    )
    table.observe(address_2, made.row_B, made.each_3B)
    return made.total


def _sample_of(out: Any) -> Tensor:
    """The prediction in what a foreign model returned: `.sample`, or the first of a tuple."""
    found = out[0] if isinstance(out, tuple) and out else getattr(out, "sample", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returned a {type(out).__name__}; it must return a tensor, an object with one as .sample, or a "
            "tuple that begins with one"
        )
    return found
