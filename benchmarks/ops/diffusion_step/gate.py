"""The correctness gate of the diffusion step: any provider, as a black box, exactly as it is timed.

A provider returns its t and x_t; the noise it drew follows from them, and with it the loss and the gradient in float64
(`diffusion_math.truth`). The draws are held against the uniform distribution and N(0, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.harness.measure import GateError
from benchmarks.ops.diffusion_step.formulas import truth
from benchmarks.ops.diffusion_step.providers import Problem, Step

CHUNK = 2**21  # elements in float64 at a time
LOSS_TOLERANCE = 1e-4  # float32, relative
GRAD_TOLERANCE = 1e-3  # float32, per sample and half (prediction, v), in the Euclidean norm,
GRAD_FLOOR = (
    1e-6  # plus this part of the sample's whole gradient: late steps' logarithms differ by few ulp
)
FIRST_TOLERANCE = 2e-2  # likelihood's gradient by v: plain float32 torch cancels in the tails
LOW_TOLERANCE = 0.05  # the noise is recovered from a rounded x_t
SIGMAS = 6.0


def check(problem: Problem, step: Step) -> None:
    """Run `step` once and judge it. Raises GateError with what was found."""
    result = step()
    t_B, x_t = result.t_B.clone(), result.x_t.detach().double()
    loss, grad = float(result.loss), result.grad.detach().clone()
    if x_t.shape != problem.x0.shape or grad.shape != problem.out.shape:
        raise GateError(f"shapes: x_t {tuple(x_t.shape)}, gradient {tuple(grad.shape)}")
    num_rows = problem.tables.num_rows
    if int(t_B.min()) < 0 or int(t_B.max()) >= num_rows:
        raise GateError(f"t outside 0 .. {num_rows - 1}")
    alpha_B = torch.from_numpy(problem.tables.sqrt_alpha_bar).to(t_B.device)[t_B]
    sigma_B = torch.from_numpy(problem.tables.sqrt_one_minus_alpha_bar).to(t_B.device)[t_B]
    shape = (-1, *[1] * (x_t.dim() - 1))
    eps = (x_t - alpha_B.view(shape) * problem.x0.double()) / sigma_B.view(shape)
    _check_draws(problem, t_B, eps)
    exact = problem.out.dtype == torch.float32
    batch = t_B.shape[0]
    losses: list[Tensor] = []
    per_chunk = max(1, CHUNK // problem.x0[0].numel())
    for part in (slice(start, start + per_chunk) for start in range(0, batch, per_chunk)):
        losses_B, expected = truth(
            problem.tables, problem.x0[part], problem.out[part], t_B[part], eps[part]
        )
        losses.append(losses_B)
        if exact:
            _check_gradient(grad[part].double() * batch, expected, t_B[part])
    expected_loss = float(torch.cat(losses).mean())
    tolerance = LOSS_TOLERANCE if exact else LOW_TOLERANCE
    if not abs(loss - expected_loss) <= tolerance * abs(expected_loss):
        raise GateError(f"loss {loss:.8g}, in float64 {expected_loss:.8g}")
    if not bool(torch.isfinite(grad).all()):
        raise GateError("the gradient is not finite")


def _check_gradient(grad: Tensor, expected: Tensor, t_B: Tensor) -> None:
    half = grad.shape[1] // 2
    for name, part in (("prediction", slice(0, half)), ("v", slice(half, None))):
        error_B = (grad[:, part] - expected[:, part]).flatten(1).norm(dim=1)
        norm_B = expected[:, part].flatten(1).norm(dim=1)
        tolerance_B = torch.full_like(error_B, GRAD_TOLERANCE)
        if name == "v":
            tolerance_B[t_B == 0] = FIRST_TOLERANCE
        whole_B = expected.flatten(1).norm(dim=1)
        bad = ~(error_B <= tolerance_B * norm_B + GRAD_FLOOR * whole_B)
        if bool(bad.any()):
            sample = int(bad.nonzero()[0])
            raise GateError(
                f"gradient by {name} of a sample at t={int(t_B[sample])} is off by "
                f"{float(error_B[sample] / norm_B[sample]):.3g} of itself"
            )


def _check_draws(problem: Problem, t_B: Tensor, eps: Tensor) -> None:
    """t uniform, the noise standard normal: moments within SIGMAS standard errors."""
    num_rows = problem.tables.num_rows
    if problem.skewed:
        if not bool((t_B == 0).any()) or not bool((t_B > 0).any()):
            raise GateError("the gate's problem asks for samples at t = 0 and for others")
    else:
        spread = math.sqrt((num_rows**2 - 1) / 12 / t_B.shape[0])
        off = abs(float(t_B.double().mean()) - (num_rows - 1) / 2) / spread
        if off > SIGMAS:
            raise GateError(f"the mean of t is {off:.1f} standard errors off")
    if problem.out.dtype != torch.float32:
        eps = eps[t_B > num_rows // 5]  # elsewhere x_t's rounding is not small beside the noise
    if eps.numel() == 0:
        return
    num = eps.numel()
    moments = ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0))
    for power, mean, variance in moments:  # of N(0, 1): E[x^k] and Var[x^k]
        found = float(eps.pow(power).mean())
        if not abs(found - mean) <= SIGMAS * math.sqrt(variance / num) + 1e-3:
            raise GateError(
                f"the mean of the noise to the power {power} is {found:.5f}, not {mean}"
            )
