"""The rivals of the diffusion step: draw t and the noise, mix, take losses and the gradient by the network's output.

`reference` is the step as public trainers write it, restated: host tables uploaded at every use, everything for every
sample. `eager` is the best plain torch we know, `compile` is torch.compile on it, `ours` the two custom ops. The
network is replaced by a fixed output, so that only this part of a training step is timed.

Shape legend: B samples, C channels, H W image, T time steps, X the prediction's shape [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from speed_kernels import contract
from speed_kernels.loss.op import diffusion_loss
from speed_kernels.noise.op import noise
from torch import Tensor

from benchmarks.harness.measure import Unavailable
from benchmarks.ops.diffusion_step.formulas import (
    LN2,
    HostTables,
    binned_nll,
    host_tables,
    packed_rows,
    uniform_cdf,
)
from benchmarks.ops.diffusion_step.reference_loss import ReferenceLoss

SEED = 2**40 + 17
# (mode of torch.compile, whether the noise is drawn inside the compiled function): all are tried, the fastest is taken.
COMPILE_VARIANTS = {
    "cpu": (("default", False), ("default", True), ("max-autotune-no-cudagraphs", False)),
    "cuda": (("default", True), ("reduce-overhead", True), ("max-autotune-no-cudagraphs", True)),
}


@dataclass(frozen=True)
class Problem:
    """x0 float32 [B, C, H, W] as loaders give it, out [B, 2C, H, W] in the network's dtype.

    `skewed`: every second sample gets t = 0, for the correctness gate; the timed problem draws t uniformly.
    """

    tables: HostTables
    x0: Tensor
    out: Tensor
    one: Tensor
    skewed: bool = False

    @property
    def device(self) -> torch.device:
        return self.x0.device


@dataclass(frozen=True)
class Result:
    """What one step gives: the batch's mean loss, its gradient by `out`, the noised samples and their time steps."""

    loss: Tensor
    grad: Tensor
    x_t: Tensor
    t_B: Tensor


Step = Callable[[], Result]


def make_problem(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    skewed: bool = False,
    seed: int = 0,
) -> Problem:
    """Latents of N(0, 1), and an output that keeps x0 within five standard deviations of the model's mean at t = 0.

    Further out plain float32 torch loses the likelihood in cancellation; the gate would take that for a mistake.
    """
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(shape, generator=generator).to(device)
    prediction = 0.1 * torch.randn(shape, generator=generator)
    v = 2.0 + 0.3 * torch.randn(shape, generator=generator)
    out = torch.cat([prediction, v], dim=1).to(device=device, dtype=dtype)
    one = torch.ones((), device=device)
    return Problem(host_tables(), x0, out.requires_grad_(), one, skewed)


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Least traffic: x0 twice (before and after the network), x_t once, out and its gradient once."""
    size = dtype.itemsize
    return int(np.prod(shape)) * (4 + size + 4 + 2 * size + 2 * size)


def gradient(loss: Tensor, out: Tensor, one: Tensor) -> Tensor:
    """What backward hands to the network: no accumulation into a leaf's `grad`.

    `one` float32 [] is d loss / d loss, kept by the caller: autograd would make, and launch a fill for, a new one.
    """
    (grad,) = torch.autograd.grad(loss, out, one)
    return grad


# ------------------------------------------------------------------ as public trainers write it


def reference(problem: Problem) -> Step:
    """Host tables, one blocking upload per use; likelihood and divergence of every sample; nothing reused."""
    x0, out, seen = problem.x0, problem.out, []
    compute = ReferenceLoss(problem.tables)

    def network(x_t: Tensor, t_B: Tensor, labels_B: None) -> Tensor:
        seen.append(x_t)
        return out

    def step() -> Result:
        t_B = torch.randint(0, problem.tables.num_rows, (x0.shape[0],), device=x0.device)
        if problem.skewed:
            t_B[::2] = 0
        loss = compute(network, x0, None, t_B, torch.randn_like(x0))
        return Result(loss.detach(), gradient(loss, out, problem.one), seen.pop(), t_B)

    return step


# ------------------------------------------------------------------ the best plain torch, and its compilation


def draw_on_host(problem: Problem) -> tuple[Tensor, Tensor]:
    """(t_B on the device, indices of the samples at t = 0 on the host): known to the host, so that nothing waits."""
    host_B = torch.randint(0, problem.tables.num_rows, (problem.x0.shape[0],))
    if problem.skewed:
        host_B[::2] = 0
    first_K = (host_B == 0).nonzero().flatten()
    return upload(host_B, problem.device), first_K


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def mixed(x0: Tensor, eps: Tensor, rows_BC: Tensor, dtype: torch.dtype) -> Tensor:
    """x_t in `dtype`."""
    a, b = columns(rows_BC, x0, 0, 1)
    return torch.addcmul(a * x0, b, eps).to(dtype)


def columns(rows_BC: Tensor, x0: Tensor, *indices: int) -> tuple[Tensor, ...]:
    """Columns of every sample's row, shaped to multiply x0."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return tuple(rows_BC[:, index].view(shape) for index in indices)


def closed_forms(out: Tensor, x0: Tensor, eps: Tensor, rows_BC: Tensor) -> tuple[Tensor, ...]:
    """(mse_B, KL_B in bits, error X, v X), everything float32: the posterior means meet in gap * error."""
    prediction, v = out.float().chunk(2, dim=1)
    log_min, log_max, gap = columns(rows_BC, x0, 5, 6, 7)
    error = prediction - eps
    mse_B = error.square().flatten(1).mean(1)
    error = error.detach()
    y = (v + 1.0) * (0.5 * (log_max - log_min))
    precision = gap.square() * torch.exp(-log_min)
    kl = (
        y
        - 1.0
        + torch.exp(-y) * torch.addcmul(torch.ones_like(precision), precision, error.square())
    )
    return mse_B, kl.flatten(1).mean(1) * (0.5 / LN2), error, v


def likelihood_bits(error: Tensor, v: Tensor, x0: Tensor, rows_BC: Tensor) -> Tensor:
    """Bits per element of x0's bin, [B]."""
    log_min, log_max, gap = columns(rows_BC, x0, 5, 6, 7)
    log_variance = log_min + (v + 1.0) * (0.5 * (log_max - log_min))
    return binned_nll(gap * error, log_variance, x0).flatten(1).mean(1) / LN2


def eager(problem: Problem) -> tuple[Step, Callable[[], Result]]:
    """Device tables gathered once, closed forms, autograd, the likelihood of the samples at t = 0 alone.

    Returns the step and its device part without likelihood, with t drawn on the device (for a CUDA graph).
    """
    x0, out = problem.x0, problem.out
    rows_T8 = packed_rows(problem.tables).to(problem.device)

    def on_device(t_B: Tensor, first_K: Tensor) -> Result:
        eps, rows_BC = torch.randn_like(x0), rows_T8[t_B]
        x_t = mixed(x0, eps, rows_BC, out.dtype)
        mse_B, vb_B, error, v = closed_forms(out, x0, eps, rows_BC)
        if len(first_K):
            at = upload(first_K, problem.device)
            nll_K = likelihood_bits(error[at], v[at], x0[at], rows_BC[at])
            vb_B = vb_B.index_copy(0, at, nll_K)
        loss = (mse_B + vb_B).mean()
        return Result(loss.detach(), gradient(loss, out, problem.one), x_t, t_B)

    nothing = torch.zeros(0, dtype=torch.int64)

    def device_part() -> Result:
        t_B = torch.randint(0, rows_T8.shape[0], (x0.shape[0],), device=x0.device)
        return on_device(t_B, nothing)

    return lambda: on_device(*draw_on_host(problem)), device_part


def compiled(
    problem: Problem, mode: str, noise_inside: bool
) -> tuple[Step, Callable[[], Result] | None]:
    """torch.compile of the eager step: one graph with the likelihood (of all, masked), one without.

    Returns the step and its device part, None where the mode itself makes CUDA graphs.
    """
    x0, out = problem.x0, problem.out
    rows_T8 = packed_rows(problem.tables).to(problem.device)

    def forward(
        x0: Tensor, out: Tensor, t_B: Tensor, eps: Tensor | None, with_first: bool
    ) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x0) if eps is None else eps
        rows_BC = rows_T8[t_B]
        x_t = mixed(x0, eps, rows_BC, out.dtype)
        mse_B, vb_B, error, v = closed_forms(out, x0, eps, rows_BC)
        if with_first:
            vb_B = torch.where(t_B == 0, likelihood_bits(error, v, x0, rows_BC), vb_B)
        return (mse_B + vb_B).mean(), x_t

    fast = torch.compile(forward, mode=mode, dynamic=False, fullgraph=True)
    if (
        mode == "reduce-overhead"
    ):  # the network's buffers stay in place; do not charge copies for them
        torch._dynamo.mark_static_address(x0)
        torch._dynamo.mark_static_address(out)

    def on_device(t_B: Tensor, with_first: bool) -> Result:
        eps = None if noise_inside else torch.randn_like(x0)
        loss, x_t = fast(x0, out, t_B, eps, with_first)
        return Result(loss.detach(), gradient(loss, out, problem.one), x_t, t_B)

    def step() -> Result:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        t_B, first_K = draw_on_host(problem)
        return on_device(t_B, len(first_K) > 0)

    def device_part() -> Result:
        t_B = torch.randint(0, rows_T8.shape[0], (x0.shape[0],), device=x0.device)
        return on_device(t_B, False)

    return step, None if mode == "reduce-overhead" else device_part


# ------------------------------------------------------------------ the custom ops


def ours(problem: Problem) -> tuple[Step, Callable[[], Result], dict[str, str]]:
    """`noise` and `loss` with the fastest backend of the device. Raises Unavailable where there is only the reference.

    Returns the step (the address is uploaded in every step, as the training loop does), its device part and facts.
    """
    x0, out, device = problem.x0, problem.out, problem.device
    choices = [contract.choose(op, device) for op in ("noise", "loss")]
    if any(choice.fallback for choice in choices):
        raise Unavailable("; ".join(choice.reason for choice in choices if choice.fallback))
    rows_T8 = packed_rows(problem.tables).to(device)
    cdf_T = uniform_cdf(problem.tables.num_rows)
    if problem.skewed:
        cdf_T = (cdf_T + 2**32) // 2
    cdf_T = cdf_T.to(device)
    time_T = torch.arange(problem.tables.num_rows, dtype=torch.float32, device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    batch = x0.shape[0]
    step_number = 0

    def on_device(address_2: Tensor) -> Result:
        x_t, row_B, _ = noise(
            x0,
            cdf_T,
            rows_T8,
            time_T,
            address_2,
            seed=SEED,
            num_slots=batch,
            stratified=False,
            dtype=out.dtype,
            backend=choices[0].backend,
        )
        total, _ = diffusion_loss(
            out,
            x0,
            row_B,
            rows_T8,
            address_2,
            seed=SEED,
            learned_variance=True,
            unit_upstream=True,
            ticket=ticket,
            backend=choices[1].backend,
        )
        return Result(total.detach(), gradient(total, out, problem.one), x_t, row_B)

    def step() -> Result:
        nonlocal step_number
        step_number += 1
        return on_device(upload(torch.tensor([step_number, 0]), device))

    fixed = torch.tensor([1, 0], device=device)
    return step, lambda: on_device(fixed), {"backend": choices[0].backend}
