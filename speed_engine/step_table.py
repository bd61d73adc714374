"""The step table: a training recipe as columns over time steps, and the two ops that read it.

    draw row j from a density      x_t    = A_j x0 + B_j eps
    tell the network tau_j         target = C_j x0 + D_j eps
                                   loss   = W_j || f(x_t, tau_j) - target ||^2

The schedule fills A, B and tau, the objective C and D, the time-step method the density and W.
Everything is computed on the host in float64; `to(device)` makes the packed tensors that the
kernels read. Usable without the engine:

    table = StepTable.from_alphas_cumprod(scheduler.alphas_cumprod, timesteps="speed").to("cuda")
    loss = diffusion_loss(model, x0, table, step=step, seed=0)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from pydantic import BaseModel
from torch import Tensor

from speed_engine.objectives import Objective
from speed_engine.schedules import Schedule, from_alphas_cumprod, from_betas
from speed_engine.timesteps import Method, MethodConfig

COLUMNS = ("A", "B", "C", "D", "W", "LOGVAR_MIN", "LOGVAR_MAX", "MEAN_GAP")
W = COLUMNS.index("W")


@dataclass
class StepTable:
    """A recipe over T rows: float64 columns on the host, packed tensors on one device.

    `density` sums to one; `weight` belongs to the objective's own target. cdf_T int64, rows_T8
    float32 (columns A, B, C, D, W, LOGVAR_MIN, LOGVAR_MAX, MEAN_GAP) and tau_T float32 are what the
    kernels see.
    """

    schedule: Schedule
    objective: Objective
    method: Method
    timesteps: MethodConfig
    learned_variance: bool
    density: Tensor
    weight: Tensor
    cdf_T: Tensor
    rows_T8: Tensor
    tau_T: Tensor

    @property
    def num_rows(self) -> int:
        """T, or the number of cells in continuous time."""
        return self.schedule.num_rows

    def to(self, device: torch.device | str) -> StepTable:
        """The same table with its packed tensors on `device`."""
        return replace(
            self,
            cdf_T=self.cdf_T.to(device),
            rows_T8=self.rows_T8.to(device),
            tau_T=self.tau_T.to(device),
        )

    def noise(
        self,
        x0: Tensor,
        address_2: Tensor,
        *,
        seed: int,
        num_slots: int,
        stratified: bool = True,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a row for every sample and noise it: (x_t like x0 in `dtype`, row_B int64, tau_B
        float32).

        address_2: int64 (step, global slot of x0's first sample) on x0's device; `num_slots` is the
        global batch.
        """
        from speed_kernels.noise.op import noise

        return noise(
            x0,
            self.cdf_T,
            self.rows_T8,
            self.tau_T,
            address_2,
            seed=seed,
            num_slots=num_slots,
            stratified=stratified,
            dtype=dtype,
            backend=_backend("noise", x0, backend),
        )

    def loss(
        self,
        out: Tensor,
        x0: Tensor,
        row_B: Tensor,
        address_2: Tensor,
        *,
        seed: int,
        vb_scale: float = 1.0,
        grad_scale: float | None = None,
        unit_upstream: bool = False,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """(grad_scale * sum over the samples of the loss, losses_3B float32: total, unweighted MSE,
        variational term in bits).

        `grad_scale` defaults to 1 / B, the mean. The noise is regenerated from the address.
        `unit_upstream` promises that backward is called on this very total: saves a pass.
        """
        from speed_kernels.loss.op import diffusion_loss as op

        return op(
            out,
            x0,
            row_B,
            self.rows_T8,
            address_2,
            seed=seed,
            learned_variance=self.learned_variance,
            vb_scale=vb_scale,
            weight_vb=self.timesteps.weight_vb,
            grad_scale=grad_scale,
            unit_upstream=unit_upstream,
            backend=_backend("loss", x0, backend),
        )

    @staticmethod
    def from_alphas_cumprod(
        alphas_cumprod: Tensor,
        timesteps: str | MethodConfig = "speed",
        objective: str = "epsilon",
        learned_variance: bool = False,
    ) -> StepTable:
        """The table of a foreign training loop with discrete time: [T], falling, e.g. diffusers'
        scheduler.alphas_cumprod.

        float32 input costs relative accuracy 1e-3 at the first steps; give `from_betas` float64
        betas where that matters.
        """
        schedule = from_alphas_cumprod(alphas_cumprod)
        return assemble(
            schedule, _config("objectives", objective), _method(timesteps), learned_variance
        )

    @staticmethod
    def from_betas(
        betas: Tensor,
        timesteps: str | MethodConfig = "speed",
        objective: str = "epsilon",
        learned_variance: bool = False,
    ) -> StepTable:
        """As `from_alphas_cumprod`, from the betas."""
        schedule = from_betas("betas", torch.as_tensor(betas).detach().cpu())
        return assemble(
            schedule, _config("objectives", objective), _method(timesteps), learned_variance
        )


def build_step_table(
    schedule_config: BaseModel,
    objective_config: BaseModel,
    timesteps_config: MethodConfig,
    learned_variance: bool = False,
) -> StepTable:
    """The table of three configurations (instances of the `Config` of a file in schedules,
    objectives and timesteps).

    Raises ValueError where they contradict each other.
    """
    schedule = _build(schedule_config)(schedule_config)
    return assemble(schedule, objective_config, timesteps_config, learned_variance)


def assemble(
    schedule: Schedule,
    objective_config: BaseModel,
    timesteps_config: MethodConfig,
    learned_variance: bool,
) -> StepTable:
    """The table on a schedule that already exists."""
    build_method = _build(timesteps_config)
    method: Method = build_method(timesteps_config, schedule)
    if schedule.continuous:
        # One row a cell of equal mass: the CDF becomes a straight line and the rows are exact.
        schedule = schedule.equal_mass(method.density)
        method = replace(
            build_method(timesteps_config, schedule),
            density=torch.full_like(method.density, 1 / schedule.num_rows),
        )
    if learned_variance and schedule.betas is None:
        raise ValueError(
            f"learned_variance needs a discrete schedule and {schedule.kind} is continuous; "
            "turn it off"
        )
    objective: Objective = _build(objective_config)(objective_config, schedule)
    weight = _own_weight(schedule, objective, method)
    if timesteps_config.normalise:
        weight = weight / (method.density * weight).sum()
    return StepTable(
        schedule=schedule,
        objective=objective,
        method=method,
        timesteps=timesteps_config,
        learned_variance=learned_variance,
        density=method.density,
        weight=weight,
        cdf_T=integer_cdf(method.density),
        rows_T8=_pack(schedule, objective, weight),
        tau_T=schedule.tau.float(),
    )


def integer_cdf(density_T: Tensor) -> Tensor:
    """cdf[j] = round(2^32 * sum_{i<=j} density_i) as int64 [T], the last exactly 2^32; on the
    density's device, no sync.

    Every row with a positive density keeps at least one of the 2^32 units, a row of density zero
    has none. The sums are over integers, so every device and every rank gets the same table.
    """
    units = (density_T.double() / density_T.double().sum() * 2**52).round().long()
    cumulative = units.cumsum(0)
    cdf = (cumulative.double() / cumulative[-1].double() * 2**32).round().long()
    positive = (density_T > 0).long().cumsum(0)
    # Strictly rising over the positive rows: raise what rounding merged, then make room at the end.
    cdf = (cdf - positive).clamp_min(0).cummax(0).values + positive
    return torch.minimum(cdf, 2**32 - (positive[-1] - positive))


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
    """The training loss of one batch, a scalar to call backward on: draw, noise, predict, compare.

    `model(x_t, tau_B[, labels], **model_kwargs)` returns a tensor like x0 (two times its channels
    with learned variance) or an object with such a `.sample`. `step` and `seed` decide every random
    number: count the step up. `first_slot` and `num_slots` place this batch in the global batch; by
    default the ranks of torch.distributed follow each other.
    """
    batch = x0.shape[0]
    if first_slot is None or num_slots is None:
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if spread else 0
        first_slot = rank * batch
        num_slots = batch * (torch.distributed.get_world_size() if spread else 1)
    address_2 = torch.empty(2, dtype=torch.int64, device=x0.device)
    address_2[0].fill_(
        step
    )  # fill_ takes the number as a kernel argument: no copy from the host, no wait
    address_2[1].fill_(first_slot)
    x_t, row_B, tau_B = table.noise(
        x0, address_2, seed=seed, num_slots=num_slots, stratified=stratified, backend=backend
    )
    arguments = (x_t, tau_B) if labels is None else (x_t, tau_B, labels)
    out = model(*arguments, **(model_kwargs or {}))
    out = out if isinstance(out, Tensor) else out.sample
    total, _ = table.loss(out, x0, row_B, address_2, seed=seed, backend=backend)
    return total


def _own_weight(schedule: Schedule, objective: Objective, method: Method) -> Tensor:
    """The method's weight restated for the objective's own target (Objective.gain); float64 [T]."""
    weight = method.weight
    if method.weight_in == "eps":
        eps_gain = schedule.alpha / schedule.sigma
        weight = weight * eps_gain.square() / objective.gain(schedule).square()
    elif method.weight_in == "x0":
        weight = weight / objective.gain(schedule).square()
    if not torch.isfinite(weight).all() or (weight < 0).any():
        raise ValueError(
            f"the weights of this time-step method are not finite on schedule {schedule.kind} with "
            f"objective {objective.kind}; use another objective"
        )
    return weight


def _pack(schedule: Schedule, objective: Objective, weight: Tensor) -> Tensor:
    """rows_T8, float32: computed in float64, rounded once."""
    zero = torch.zeros_like(weight)
    log_min, log_max, gap = zero, zero, zero
    if schedule.betas is not None:
        betas, alpha_bar = schedule.betas, schedule.alpha.square()
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        # q(x_{t-1} | x_t, x0): the variance at row 0 is 0 and takes its neighbour's (improved
        # DDPM).
        variance = betas * (1 - previous) / (1 - alpha_bar)
        variance = torch.cat([variance[1:2], variance[1:]])
        log_min, log_max = variance.log(), betas.log()
        x0_factor = betas * previous.sqrt() / (1 - alpha_bar)
        gap = -x0_factor / objective.gain(schedule)
    scale = objective.input_scale
    columns = (
        schedule.alpha * scale,
        schedule.sigma * scale,
        objective.target_x0,
        objective.target_eps,
    )
    return torch.stack([*columns, weight, log_min, log_max, gap], dim=1).float().contiguous()


def _build(config: BaseModel) -> Callable[..., Any]:
    """The `build` of the file that defines this configuration's class: also for files outside the
    repository.
    """
    return importlib.import_module(type(config).__module__).build


def _config(folder: str, kind: str) -> BaseModel:
    """The default configuration of `kind` in one of the three folders. Raises ValueError that lists
    what exists.
    """
    package = importlib.import_module(f"speed_engine.{folder}")
    if kind not in package.names():
        raise ValueError(
            f"{folder} has no {kind!r}; it has: {', '.join(package.names())}"
            + _near(kind, package.names())
        )
    return importlib.import_module(f"speed_engine.{folder}.{kind}").Config()


def _near(word: str, known: list[str]) -> str:
    import difflib

    matches = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _method(timesteps: str | MethodConfig) -> MethodConfig:
    if isinstance(timesteps, str):
        return cast(MethodConfig, _config("timesteps", timesteps))
    return timesteps


def _backend(op: str, x: Tensor, backend: str) -> str:
    """The backend to run `op` with on x's device."""
    if backend != "auto":
        return backend
    from speed_kernels.contract import choose

    return choose(op, x.device).backend
