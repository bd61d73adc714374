"""The step table: a training recipe as columns over time steps, and the two ops that read it.

    draw row j from a density      x_t    = A_j x0 + B_j eps
    tell the network time_j         target = C_j x0 + D_j eps
                                   loss   = W_j || f(x_t, time_j) - target ||^2

The schedule fills A, B and time, the objective C and D, the time-step method the density and W. It
is built on the host in float64; `to(device)` moves it to where the kernels read it. Methods that
change while training runs rewrite the density and W in place: `start` once, `observe` after every
micro-batch, `before_update` and `after_update` around and `refresh` after every step; all of them do
nothing for others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from speed_engine.kinds import asked, home
from speed_engine.objectives import Objective, W, pack, weight_ceiling
from speed_engine.schedules import Schedule, from_alphas_cumprod, from_flow, from_sigmas
from speed_engine.timesteps import Method, MethodConfig, integer_cdf
from speed_engine.timesteps.online import Columns
from speed_engine.timesteps.online.buffer import AllReduce
from speed_engine.timesteps.online.policy import ALONE, Evaluate, Policy, Reach
from speed_engine.timesteps.online.session import Session


@dataclass(repr=False)
class StepTable:
    """A recipe over T rows.

    `density` (sums to one) and `weight` (on the objective's own target) are float64 [T]; cdf_T
    int64, rows_T8 float32 (A, B, C, D, W, LOGVAR_MIN, LOGVAR_MAX, MEAN_GAP) and time_T float32 are
    what the kernels see. All five are on one device and are written in place when the method
    changes; schedule, objective and method stay on the host.
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
    time_T: Tensor
    ticket: Tensor  # int32 [1], zero between the calls of `loss`: its kernel counts here
    session: Session | None = None  # the running state of a method that changes

    def __repr__(self) -> str:
        variance = ", learned variance" if self.learned_variance else ""
        recipe = f"{home(self.timesteps).__name__.split('.')[-1]} on {self.schedule.kind}"
        predicts = f"predicts {self.objective.kind}{variance}"
        return f"StepTable({recipe}, {self.num_rows} rows, {predicts}, {self.device})"

    @property
    def num_rows(self) -> int:
        """T, or the number of cells in continuous time."""
        return self.schedule.num_rows

    @property
    def device(self) -> torch.device:
        """Where the kernels read the table."""
        return self.rows_T8.device

    @functools.cached_property  # as `policy`: asked at every step
    def changes(self) -> bool:
        """Whether the method rewrites the table while training runs."""
        return any(part.online is not None for part in self.method.factors)

    @functools.cached_property
    def policy(self) -> Policy | None:
        """The part that draws rows by looking at the samples, if the method has one."""
        online = (part.online for part in self.method.factors)
        return next((part for part in online if isinstance(part, Policy)), None)

    def to(self, device: torch.device | str) -> StepTable:
        """The same recipe with its tensors on `device`; to be called before `start`."""
        assert self.session is None
        names = ("density", "weight", "cdf_T", "rows_T8", "time_T", "ticket")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)

    # ---------------------------------------------------------------- the two ops

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
        """Draw a row a sample and noise it: (x_t like x0 in `dtype`, row_B int64, time_B float32).

        address_2: int64 (step, global slot of x0's first sample) on x0's device; `num_slots` is the
        global batch. A method whose draw depends on the sample (`adaptive`) ignores `stratified`.
        """
        if self.policy is not None:
            if self.session is None:
                raise ValueError("this method has no state yet; call table.start(num_slots, shape)")
            word_B = _words(address_2, x0.shape[0], seed)
            row_B = self.policy.draw(x0, word_B)
            return self.noise_at(x0, row_B, address_2, seed=seed, dtype=dtype, backend=backend)
        from speed_kernels.contract import fastest
        from speed_kernels.noise.op import noise

        return noise(
            x0,
            self.cdf_T,
            self.rows_T8,
            self.time_T,
            address_2,
            seed=seed,
            num_slots=num_slots,
            stratified=stratified,
            dtype=dtype,
            backend=fastest("noise", x0.device, backend),
        )

    def noise_at(
        self,
        x0: Tensor,
        row_B: Tensor,
        address_2: Tensor,
        *,
        seed: int,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `noise`, at rows that somebody else chose (int64 [B]); returned with x_t and time_B."""
        from speed_kernels.contract import fastest
        from speed_kernels.noise.op import noise_at

        return noise_at(
            x0,
            row_B,
            self.rows_T8,
            self.time_T,
            address_2,
            seed=seed,
            dtype=dtype,
            backend=fastest("noise", x0.device, backend),
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
        """(grad_scale * sum of the samples' losses, losses_3B float32: total, unweighted MSE, bits).

        `grad_scale` defaults to 1 / B, the mean. The noise is regenerated from the address.
        """
        from speed_kernels.contract import fastest
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
            ticket=self.ticket,
            backend=fastest("loss", x0.device, backend),
        )

    # ---------------------------------------------------------------- for foreign training loops

    @staticmethod
    def from_alphas_cumprod(
        alphas_cumprod: Tensor,
        timesteps: str | dict[str, Any] | MethodConfig = "speed",
        objective: str = "epsilon",
        learned_variance: bool = False,
    ) -> StepTable:
        """The table of discrete time: [T], falling, e.g. diffusers' `scheduler.alphas_cumprod`.

        float32 input costs relative accuracy 1e-3 at the first steps; float64 does not.
        """
        schedule = from_alphas_cumprod(alphas_cumprod)
        recipe = asked("objective", objective), asked("timesteps", timesteps)
        return assemble(schedule, *recipe, learned_variance)

    @staticmethod
    def from_sigmas(
        sigmas: Tensor,
        timesteps: str | dict[str, Any] | MethodConfig = "uniform",
        objective: str = "edm",
        sigma_data: float = 0.5,
    ) -> StepTable:
        """The table of x_t = x0 + sigma eps at the given noise levels ([T], positive, any order).

        The network is told ln(sigma) / 4.
        """
        recipe = asked("objective", objective), asked("timesteps", timesteps)
        return assemble(from_sigmas(sigmas, sigma_data), *recipe, learned_variance=False)

    @staticmethod
    def from_flow(
        times: Tensor | None = None,
        timesteps: str | dict[str, Any] | MethodConfig = "logit_normal",
        objective: str = "flow",
        time_scale: float = 1000.0,
    ) -> StepTable:
        """The table of rectified flow, x_t = (1 - t) x0 + t eps, target eps - x0.

        `times` are a discrete scheduler's t in (0, 1] ([T], e.g. diffusers' scheduler.sigmas
        without its final 0), None is continuous time. The network is told time_scale * t.
        """
        schedule = from_flow(times, time_scale)
        recipe = asked("objective", objective), asked("timesteps", timesteps)
        return assemble(schedule, *recipe, learned_variance=False)

    # ---------------------------------------------------------------- changing while training runs

    def start(self, num_slots: int, shape: tuple[int, ...] = ()) -> None:
        """Allocate the state of a method that changes, on the table's device; nothing for others.

        `num_slots` is the global batch, `shape` a sample's shape (only `adaptive` looks at it).
        """
        if self.changes:
            gain = self.objective.gain(self.schedule)
            eps_gain = self.schedule.alpha / self.schedule.sigma
            owns = [part.own_weight(gain, eps_gain) for part in self.method.factors]
            fixed = (self.weight, gain, eps_gain, self.schedule.log_snr, self.schedule.measure)
            columns = [
                Columns(*(each.to(self.device) for each in (part.density, own, *fixed)))
                for part, own in zip(self.method.factors, owns, strict=True)
            ]
            kind = getattr(self.timesteps, "kind", "?")
            parts = [part.online for part in self.method.factors]
            self.session = Session(kind, parts, columns, num_slots, shape)
        self._install(step=0)

    def observe(self, address_2: Tensor, row_B: Tensor, losses_3B: Tensor) -> None:
        """Note a micro-batch's losses: address_2, row_B as `noise` had them, losses_3B from `loss`."""
        if self.session is not None:
            self.session.observe(address_2, row_B, losses_3B)

    def before_update(
        self,
        step: int,
        x0: Tensor,
        conditions: Mapping[str, Tensor],
        row_B: Tensor,
        evaluate: Evaluate,
        reach: Reach = ALONE,
    ) -> None:
        """Call with `step` finished steps, when the gradients are ready; every rank alike.

        A method that looks at the network before and after an update measures it now; nothing for
        others. x0, conditions and row_B are the last micro-batch of the update and its rows.
        """
        if self.policy is not None and self.policy.due(step):
            self.policy.before(step, x0, conditions, row_B, evaluate, reach)

    def after_update(self, step: int, evaluate: Evaluate, reach: Reach = ALONE) -> None:
        """Call after the optimizer's step, with the same `step` as `before_update`; every rank alike."""
        if self.policy is not None and self.policy.due(step):
            self.policy.after(evaluate, reach)

    def refresh(self, step: int, all_reduce: AllReduce | None = None) -> None:
        """Bring the columns up to date after `step` finished steps; a no-op unless something is
        due.

        At most one `all_reduce` (a sum over the ranks, in place). Raises ValueError where a method
        that learns from losses was never told any.
        """
        changed = self.session is not None and self.session.refresh(step, all_reduce)
        if changed or 0 < step <= self.objective.clamp_steps:
            self._install(step)

    def state_dict(self, all_reduce: AllReduce | None = None) -> dict[str, Tensor]:
        """What a resumed run needs, on the host, equal on every rank; empty for fixed methods.

        Every rank has to call it: half an interval's observations are summed over the ranks.
        """
        return {} if self.session is None else self.session.state_dict(all_reduce)

    def load_state_dict(self, state: dict[str, Tensor], step: int) -> None:
        """Continue after `step` finished steps from what `state_dict` gave; to be called after
        `start`.

        Raises ValueError where the state belongs to another method or another batch.
        """
        if self.session is not None:
            self.session.load_state_dict(state)
        elif state:
            raise ValueError(
                "the saved run had a method that changes, this one is fixed; keep timesteps"
            )
        self._install(step)

    def _install(self, step: int) -> None:
        """Write the present columns into the tensors that the kernels read. Device work only."""
        if self.session is not None:
            density, weight = self.session.columns()
            if self.timesteps.normalise:
                weight = weight / (density * weight).sum()
            self.density.copy_(density)
            self.weight.copy_(weight)
            self.cdf_T.copy_(integer_cdf(density))
        weight = self.weight
        ceiling = weight_ceiling(step, self.objective.clamp_steps)
        if ceiling is not None:
            a, b, c, d = self.rows_T8[:, :4].double().unbind(dim=1)
            gain = (c - d * a / b).square()  # Objective.gain, without a copy from the host
            weight = (weight * gain).clamp(max=ceiling) / gain
        self.rows_T8[:, W] = weight.float()


def build_step_table(
    schedule_config: BaseModel,
    objective_config: BaseModel,
    timesteps_config: BaseModel,
    learned_variance: bool = False,
) -> StepTable:
    """The table of three configurations (instances of the `Config` of a file in schedules,
    objectives and timesteps).

    Raises ValueError where they contradict each other.
    """
    schedule = home(schedule_config).build(schedule_config)
    return assemble(schedule, objective_config, timesteps_config, learned_variance)


def assemble(
    schedule: Schedule,
    objective_config: BaseModel,
    timesteps_config: BaseModel,
    learned_variance: bool,
) -> StepTable:
    """The table on a schedule that already exists."""
    assert isinstance(timesteps_config, MethodConfig)
    build_method = home(timesteps_config).build
    method: Method = build_method(timesteps_config, schedule)
    if schedule.continuous and all(part.online is None for part in method.factors):
        # One row a cell of equal mass: the CDF becomes a straight line and the rows are exact.
        schedule = schedule.equal_mass(method.density)
        uniform = torch.full_like(method.density, 1 / schedule.num_rows)
        method = replace(build_method(timesteps_config, schedule), density=uniform)
    if learned_variance and schedule.betas is None:
        raise ValueError(
            f"learned_variance needs a discrete schedule and {schedule.kind} is continuous; "
            "turn it off"
        )
    objective: Objective = home(objective_config).build(objective_config, schedule)
    gain, eps_gain = objective.gain(schedule), schedule.alpha / schedule.sigma
    weight = torch.stack([part.own_weight(gain, eps_gain) for part in method.factors]).prod(dim=0)
    if timesteps_config.normalise:
        weight = weight / (method.density * weight).sum()
    table = StepTable(
        schedule=schedule,
        objective=objective,
        method=method,
        timesteps=timesteps_config,
        learned_variance=learned_variance,
        density=method.density.clone(),
        weight=weight,
        cdf_T=integer_cdf(method.density),
        rows_T8=pack(schedule, objective, weight),
        time_T=schedule.time.float(),
        ticket=torch.zeros(1, dtype=torch.int32),
    )
    table._install(step=0)
    return table


def _words(address_2: Tensor, batch: int, seed: int) -> Tensor:
    """The 32-bit words by which an independent draw chooses rows; int64 [B]."""
    from speed_kernels import philox

    slot_B = address_2[1] + torch.arange(batch, device=address_2.device)
    return philox.uniform_draw(seed, address_2[0], slot_B, 1, stratified=False)
