"""The plain rivals of a whole training step: forward, loss, backward, optimizer, EMA; no data loading, no VAE.

`reference` is the loop as public trainers write it: float32 (on a GPU TF32), host tables, AdamW as torch builds it by
default, an EMA over named parameters tensor by tensor, the loss read in every step. `eager` is good plain torch: bf16
autocast, tables on the device, fused AdamW, a foreach EMA. `compiled` is torch.compile of eager's model and loss.

Where a batch does not fit the memory a rival takes it in equal parts and adds up gradients; the report says which.
"""

# torch's own optimizers use the foreach operations below; torch just does not list them.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import GateError
from benchmarks.ops.diffusion_step.formulas import packed_rows
from benchmarks.ops.diffusion_step.providers import upload
from benchmarks.ops.diffusion_step.reference_loss import Network, ReferenceLoss
from benchmarks.train_step import plain_dit
from benchmarks.train_step.losses import Draw, eager_loss, masked_loss
from benchmarks.train_step.problem import (
    BETAS,
    DECAY,
    EPS,
    LABEL_DROPOUT,
    LR,
    WEIGHT_DECAY,
    Problem,
    State,
)

# `blocks` compiles each block by itself, the others model and loss as one graph. By rising time to compile.
COMPILE_MODES = {
    "cpu": ("default",),
    "cuda": ("blocks", "default", "reduce-overhead", "max-autotune-no-cudagraphs"),
}
Loss = Callable[[Tensor, Tensor, Draw], Tensor]  # (x0, labels_B, draw) -> mean loss []


@dataclass
class Trainer:
    """One provider, ready to train. All providers start from the same weights and see the same batch.

    step: one timed step. gate_step: step number k at `Problem.gate_draw(k)`, gives its loss. learned: float32 copies on
    the host of the named weights, or of their EMAs. check: raises GateError where the steps so far went wrong.
    """

    step: Callable[[], object]
    gate_step: Callable[[int], float]
    learned: Callable[[Sequence[str], bool], dict[str, Tensor]]
    check: Callable[[], None]
    reset: Callable[[], None] = lambda: None
    optimizer: torch.optim.Optimizer | None = None  # whose memory others may borrow
    state_bytes: Callable[[], int] = lambda: 0  # of weights, moments and EMAs, wherever they lie
    facts: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


@dataclass
class PlainTrainer:
    """The loop that the three plain rivals share; what they do differently is given."""

    problem: Problem
    state: State
    model: plain_dit.PlainDiT
    loss: Loss
    optimizer: torch.optim.Optimizer
    average: Callable[[], object]
    draw: Callable[[Problem], Draw]
    read: bool  # the loss in every step
    parts: int = 1
    before: Callable[[], object] = lambda: None
    last: float = 0.0  # what `read` read

    def step(self) -> Tensor:
        """One step at a draw of its own."""
        loss = self.update(self.draw(self.problem))
        if self.read:
            self.last = loss.item()
        return loss

    def update(self, draw: Draw) -> Tensor:
        """Forward, backward, optimizer, EMA -> the mean loss, detached."""
        self.before()
        size = self.problem.case.batch // self.parts
        losses = []
        for start in range(0, self.problem.case.batch, size):
            part = slice(start, start + size)
            inside = draw if self.parts == 1 else draw.part(start, start + size)
            loss = self.loss(self.problem.x0[part], self.problem.labels_B[part], inside)
            (loss if self.parts == 1 else loss / self.parts).backward()
            losses.append(loss.detach())
        self.optimizer.step()
        # After the step and not before the next: other providers' steps need the memory of the gradients.
        self.optimizer.zero_grad(set_to_none=True)
        self.average()
        return losses[0] if self.parts == 1 else torch.stack(losses).mean()

    def gate_step(self, index: int) -> float:
        """Without dropping labels, so that all networks see the same."""
        kept, self.model.label_dropout = self.model.label_dropout, 0.0
        try:
            return float(self.update(self.problem.gate_draw(index)))
        finally:
            self.model.label_dropout = kept

    def learned(self, names: Sequence[str], ema: bool) -> dict[str, Tensor]:
        source = self.state.emas if ema else self.state.weights
        return {name: source[name].detach().cpu().clone() for name in names}

    def reset(self) -> None:
        self.state.reset()
        for state in self.optimizer.state.values():
            state["step"].zero_()

    def check(self) -> None:
        loss = float(self.update(self.problem.gate_draw(0)))
        if not math.isfinite(loss):
            raise GateError(f"the loss after the measured steps is {loss}")

    def trainer(self, **facts: Any) -> Trainer:
        """This loop as a provider."""
        if self.parts > 1:
            facts["micro_batch"] = self.problem.case.batch // self.parts
        return Trainer(
            self.step,
            self.gate_step,
            self.learned,
            self.check,
            self.reset,
            state_bytes=lambda: 16 * self.problem.case.work.parameters,
            facts=facts,
        )


# ------------------------------------------------------------------ the parts


def network_of(problem: Problem, state: State, upload: bool) -> plain_dit.PlainDiT:
    """A network on the shared weights."""
    model = plain_dit.build(weights=state.weights, upload=upload, **problem.case.network)
    model.label_dropout = LABEL_DROPOUT
    return model


def adamw(model: torch.nn.Module, state: State, **how: bool) -> torch.optim.AdamW:
    """torch's AdamW, `how` it is built; its moments are the shared ones."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **how
    )
    for name, parameter in model.named_parameters():
        place = parameter.device if how.get("fused") else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=place),
            "exp_avg": state.moments[name],
            "exp_avg_sq": state.squares[name],
        }
    return optimizer


def average_by_name(model: torch.nn.Module, state: State) -> Callable[[], None]:
    """The EMA as a loop over two dictionaries of named parameters."""

    @torch.no_grad()
    def average() -> None:
        with torch.profiler.record_function("ema"):
            averages = dict(state.emas)
            for name, parameter in dict(model.named_parameters()).items():
                averages[name].mul_(DECAY).add_(parameter.data, alpha=1 - DECAY)

    return average


def average_foreach(state: State) -> Callable[[], None]:
    """The EMA as one foreach operation."""
    averages, weights = list(state.emas.values()), list(state.weights.values())

    @torch.no_grad()
    def average() -> None:
        with torch.profiler.record_function("ema"):
            torch._foreach_lerp_(averages, weights, 1.0 - DECAY)

    return average


def draw_on_device(problem: Problem) -> Draw:
    """Everything drawn where it is used, as trainers do; the samples at t = 0 are not known to the host."""
    x0 = problem.x0
    t_B = torch.randint(0, problem.tables.num_rows, (x0.shape[0],), device=x0.device)
    return Draw(t_B, torch.randn_like(x0), torch.zeros(0, dtype=torch.int64))


def draw_on_host(problem: Problem) -> Draw:
    """Time steps drawn on the host and uploaded, so that it knows the samples at t = 0 without waiting."""
    host_B = torch.randint(0, problem.tables.num_rows, (problem.x0.shape[0],))
    first_K = (host_B == 0).nonzero().flatten()
    return Draw(upload(host_B, problem.device), torch.randn_like(problem.x0), first_K)


def in_bf16(model: plain_dit.PlainDiT, device: torch.device) -> Network:
    """The network under autocast."""

    def network(x_t: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(x_t, t_B, labels_B)

    return network


# ------------------------------------------------------------------ the rivals


def reference(problem: Problem, state: State, parts: int = 1) -> Trainer:
    """The loop as public trainers write it."""
    model = network_of(problem, state, upload=True)
    compute = ReferenceLoss(problem.tables)
    loop = PlainTrainer(
        problem,
        state,
        model,
        lambda x0, labels_B, draw: compute(model, x0, labels_B, draw.t_B, draw.eps),
        adamw(model, state),
        average_by_name(model, state),
        draw_on_device,
        read=True,
        parts=parts,
    )
    dtype = "float32, products in TF32" if problem.device.type == "cuda" else "float32"
    return loop.trainer(dtype=dtype)


def eager(problem: Problem, state: State, parts: int = 1) -> Trainer:
    """Good plain torch."""
    model = network_of(problem, state, upload=False)
    network = in_bf16(model, problem.device)
    rows_T8 = packed_rows(problem.tables).to(problem.device)
    loop = PlainTrainer(
        problem,
        state,
        model,
        lambda x0, labels_B, draw: eager_loss(network, x0, labels_B, draw, rows_T8),
        adamw(model, state, fused=True),
        average_foreach(state),
        draw_on_host,
        read=False,
        parts=parts,
    )
    return loop.trainer(dtype="bfloat16 autocast")


def compiled(problem: Problem, state: State, mode: str, parts: int = 1) -> Trainer:
    """torch.compile of eager's model and loss in `mode`, or of its blocks; the optimizer and the EMA are eager's."""
    model = network_of(problem, state, upload=False)
    model.label_dropout = (
        0.0  # the gate and the timed steps must be one graph; the cost is one row of numbers
    )
    network = in_bf16(model, problem.device)
    rows_T8 = packed_rows(problem.tables).to(problem.device)

    def loss_of(x0: Tensor, labels_B: Tensor, t_B: Tensor, eps: Tensor) -> Tensor:
        return masked_loss(network, x0, labels_B, t_B, eps, rows_T8)

    fast = loss_of
    if mode == "blocks":
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
    else:
        fast = torch.compile(loss_of, mode=mode, dynamic=False, fullgraph=True)
    before: Callable[[], object] = lambda: None  # noqa: E731
    if mode == "reduce-overhead":
        before = torch.compiler.cudagraph_mark_step_begin
        if parts == 1:  # the batch stays in place; do not charge copies for it
            torch._dynamo.mark_static_address(problem.x0)
            torch._dynamo.mark_static_address(problem.labels_B)
    loop = PlainTrainer(
        problem,
        state,
        model,
        lambda x0, labels_B, draw: fast(x0, labels_B, draw.t_B, draw.eps),
        adamw(model, state, fused=True),
        average_foreach(state),
        draw_on_device,
        read=False,
        parts=parts,
        before=before,
    )
    return loop.trainer(dtype="bfloat16 autocast", compile_mode=mode)
