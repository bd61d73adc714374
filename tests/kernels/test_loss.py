"""The loss op against the published loss written from its definition, with autograd's gradient, in float64."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_kernels.loss import cpp_cpu, reference
from speed_kernels.loss.op import diffusion_loss, loss_op, sample_inputs
from speed_kernels.noise.op import noise
from speed_kernels.table import epsilon
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
CASES = range(len(list(sample_inputs())))
SEED = 2**35 + 5

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def to(device: str, *values: Any) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


class Linear:
    """The linear schedule of 1000 steps for a network that predicts eps: the table and its formulas."""

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        kept = (1 - betas).cumprod(0)
        before = torch.cat((torch.ones(1).double(), kept[:-1]))
        variance = betas * (1 - before) / (1 - kept)
        self.betas, self.kept, self.before = betas, kept, before
        self.log_variance = torch.cat((variance[1:2], variance[1:])).log()
        rows = torch.zeros(1000, 8, dtype=torch.float64)
        rows[:, 0], rows[:, 1] = kept.sqrt(), (1 - kept).sqrt()
        rows[:, 3] = 1.0
        rows[:, 4] = torch.linspace(0.3, 1.7, 1000)
        rows[:, 5], rows[:, 6] = self.log_variance, betas.log()
        rows[:, 7] = betas / ((1 - kept).sqrt() * (1 - betas).sqrt())
        self.rows = rows.float()
        # Late rows' two log variances differ by about one unit in the last place: take what the table holds of them.
        self.log_variance, self.log_betas = self.rows[:, 5].double(), self.rows[:, 6].double()


def published_loss(
    schedule: Linear,
    f: Tensor,
    v: Tensor | None,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    vb_scale: float,
    weight_vb: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, mse, vb), each [B], by the definitions of Nichol and Dhariwal; differentiable."""

    def at(values: Tensor) -> Tensor:
        return values.double()[t].view(-1, *[1] * (x0.dim() - 1))

    weight = schedule.rows[:, 4].double()[t]
    mse = ((f - eps) ** 2).flatten(1).mean(1)
    if v is None:
        return weight * mse, mse, torch.zeros_like(mse)
    kept, before, beta = at(schedule.kept), at(schedule.before), at(schedule.betas)
    x_t = kept.sqrt() * x0 + (1 - kept).sqrt() * eps

    def posterior_mean(x: Tensor) -> Tensor:
        return (before.sqrt() * beta * x + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - kept)

    true_mean, true_log_var = posterior_mean(x0), at(schedule.log_variance)
    predicted = (x_t - (1 - kept).sqrt() * f.detach()) / kept.sqrt()
    mean = posterior_mean(predicted)
    fraction = (v + 1) / 2
    log_var = fraction * at(schedule.log_betas) + (1 - fraction) * true_log_var
    kl = 0.5 * (-1 + log_var - true_log_var + (true_log_var - log_var).exp())
    kl = kl + 0.5 * (true_mean - mean) ** 2 * torch.exp(-log_var)

    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    scale = torch.exp(-0.5 * log_var)
    upper, lower = cdf(scale * (x0 - mean + 1 / 255)), cdf(scale * (x0 - mean - 1 / 255))
    log_p = torch.where(
        x0 < -0.999,
        upper.clamp(min=1e-12).log(),
        torch.where(
            x0 > 0.999, (1 - lower).clamp(min=1e-12).log(), (upper - lower).clamp(min=1e-12).log()
        ),
    )
    first = (t == 0).view(-1, *[1] * (x0.dim() - 1))
    vb = torch.where(first, -log_p, kl).flatten(1).mean(1) / math.log(2)
    return weight * mse + vb_scale * (weight if weight_vb else 1) * vb, mse, vb


class Problem:
    """A batch near what a trained network meets: predictions close to the noise, pixel values at both ends."""

    def __init__(
        self,
        shape: tuple[int, ...] = (4, 3, 6, 6),
        learned: bool = True,
        spread: float = 0.3,
        rows: tuple[int, ...] = (0, 1, 500, 999),
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.schedule = Linear()
        self.x0 = torch.randn(shape, generator=generator).clamp(-1, 1)
        self.row_B = torch.tensor([rows[b % len(rows)] for b in range(shape[0])])
        self.address = torch.tensor([12, 40])
        self.learned = learned
        self.eps = epsilon(self.x0.shape, self.address, SEED)
        f = self.eps.float() + spread * torch.randn(shape, generator=generator)
        v = torch.randn(shape, generator=generator)
        self.out = torch.cat((f, v), 1) if learned else f

    def arguments(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return to(
            device,
            self.out.to(dtype, copy=True),
            self.x0,
            self.row_B,
            self.schedule.rows,
            self.address,
        )

    def run(self, backend: str, device: str, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """total, losses and gradient of the op."""
        dtype = options.pop("dtype", torch.float32)
        out, *rest = self.arguments(device, dtype)
        out.requires_grad_()
        total, losses = diffusion_loss(
            out, *rest, seed=SEED, learned_variance=self.learned, backend=backend, **options
        )
        total.backward()
        assert out.grad is not None
        return total.detach().cpu(), losses.cpu(), out.grad.cpu()

    def published(
        self, vb_scale: float = 1.0, weight_vb: bool = False, grad_scale: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = self.out.double().requires_grad_()
        f, v = out.chunk(2, 1) if self.learned else (out, None)
        losses = published_loss(
            self.schedule, f, v, self.x0.double(), self.eps, self.row_B, vb_scale, weight_vb
        )
        total = losses[0].sum() * (1 / len(self.x0) if grad_scale is None else grad_scale)
        total.backward()
        assert out.grad is not None
        return total.detach(), torch.stack(losses).detach(), out.grad


def assert_losses(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=2e-5, atol=1e-6)


def assert_gradient(
    got: Tensor, expected: Tensor, row_B: Tensor, learned: bool, dtype: torch.dtype = torch.float32
) -> None:
    """Every sample's two gradients within the op's tolerance of their largest entry, plus rounding to `dtype`."""
    parts = ((0, 2e-5), (1, 2e-5)) if learned else ((0, 2e-5),)
    for part, tolerance in parts:
        for b, row in enumerate(row_B.tolist()):
            x, y = (
                grad[b].double().chunk(2)[part] if learned else grad[b].double()
                for grad in (got, expected)
            )
            allowed = (1e-3 if part == 1 and row == 0 else tolerance) * y.abs().max()
            allowed = (
                allowed
                + torch.finfo(dtype).eps * y.abs()
                + torch.finfo(dtype).smallest_normal * 0.01
            )
            assert ((x - y).abs() <= allowed).all(), f"sample {b}, row {row}, part {part}"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"vb_scale": 0.001, "weight_vb": True, "grad_scale": 0.5},
    {"vb_scale": 0.0},
]


@every_backend
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("learned", [True, False])
def test_is_the_published_loss(
    backend: str, device: str, learned: bool, options: dict[str, Any]
) -> None:
    problem = Problem(learned=learned)
    total, losses, grad = problem.run(backend, device, **options)
    expected_total, expected, expected_grad = problem.published(**options)
    assert_losses(losses, expected)
    assert_losses(total, expected_total)
    assert_gradient(grad, expected_grad, problem.row_B, learned)


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(backend: str, device: str, case: int) -> None:
    args = list(sample_inputs())[case]
    total, losses, grad = (tensor.cpu() for tensor in loss_op(*to(device, *args[:-1], backend)))
    out, dtype = args[0], args[0].dtype
    exact_total, exact, exact_grad = reference.loss(out.double(), *args[1:-1], None)
    assert_losses(losses, exact)
    assert_losses(total, exact_total)
    assert grad.dtype == dtype and grad.shape == out.shape and grad.is_contiguous()
    assert_gradient(grad, exact_grad, args[2], args[6], dtype)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(backend: str, device: str, dtype: torch.dtype) -> None:
    problem = Problem()
    problem.out = problem.out.to(dtype).float()
    _, losses, grad = problem.run(backend, device, dtype=dtype, grad_scale=64.0)
    _, expected, expected_grad = problem.published(grad_scale=64.0)
    assert grad.dtype == dtype
    assert_losses(losses, expected)
    assert_gradient(grad, expected_grad, problem.row_B, True, dtype)


@every_backend
@pytest.mark.parametrize("spread", [1e-2, 0.3, 3.0, 30.0])
def test_likelihood_from_its_centre_to_its_far_tails(
    backend: str, device: str, spread: float
) -> None:
    """Row 0, with pixels at both ends of the range, from perfect predictions to some that no bin can hold."""
    problem = Problem(shape=(3, 4, 5, 5), spread=spread, rows=(0,))
    problem.x0[0] = 1.0
    problem.x0[1] = -1.0
    problem.x0[:, 0, 0, 0] = torch.tensor([0.9990001, -0.9990001, 0.99899995])
    _, losses, grad = problem.run(backend, device)
    _, expected, expected_grad = problem.published()
    assert_losses(losses, expected)
    assert_gradient(grad, expected_grad, problem.row_B, True)


@every_backend
@pytest.mark.parametrize("row", [0, 300])
def test_variance_outputs_far_outside_their_range(backend: str, device: str, row: int) -> None:
    problem = Problem(rows=(row,))
    v = problem.out[:, 3:]
    v *= 12.0
    _, losses, grad = problem.run(backend, device)
    _, expected, expected_grad = problem.published()
    assert torch.isfinite(losses).all() and torch.isfinite(grad).all()
    assert_losses(losses, expected)
    assert_gradient(grad, expected_grad, problem.row_B, True)


@every_backend
def test_uses_the_noise_of_the_noise_op(backend: str, device: str) -> None:
    """A network that returns exactly (x_t - A x0) / B has no error."""
    problem = Problem(shape=(6, 3, 5, 5), learned=False)
    cdf = torch.arange(1, 1001) * (2**32 // 1000)
    cdf[-1] = 2**32
    rows = problem.schedule.rows
    tensors = to(device, problem.x0, cdf, rows, torch.zeros(1000), problem.address)
    x_t, row_B, _ = noise(*tensors, seed=SEED, num_slots=64, backend=backend)
    x0, rows, address = tensors[0], tensors[2], tensors[4]
    a, b = (rows[:, column][row_B].view(-1, 1, 1, 1) for column in (0, 1))
    _, losses = diffusion_loss(
        (x_t - a * x0) / b, x0, row_B, rows, address, seed=SEED, backend=backend
    )
    assert losses[1].max().item() < 1e-8


@every_backend
def test_a_sample_s_result_does_not_depend_on_its_batch(backend: str, device: str) -> None:
    problem = Problem(shape=(5, 3, 7, 5))
    out, x0, row_B, rows, address = problem.arguments(device)
    options = {"seed": SEED, "learned_variance": True, "grad_scale": 1.0, "backend": backend}
    _, whole = diffusion_loss(out, x0, row_B, rows, address, **options)
    for b in range(5):
        part = slice(b, b + 1)
        moved = address + torch.tensor([0, b], device=device)
        _, alone = diffusion_loss(out[part], x0[part], row_B[part], rows, moved, **options)
        assert torch.equal(alone, whole[:, part])


@every_backend
@pytest.mark.parametrize("shape", [(2, 2, 1111), (2, 1, 9001), (3, 3, 64, 64)])
def test_samples_of_many_tiles(
    backend: str, device: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETING:
        shape = {1111: shape, 9001: (1, 1, 9001), 64: (1, 1, 3, 1025)}[shape[-1]]
        monkeypatch.setattr("speed_kernels.launch.tiles_per_program", lambda *_: 2)
    problem = Problem(shape=shape, rows=(700, 0))
    total, losses, grad = problem.run(backend, device)
    expected_total, expected, expected_grad = problem.published()
    assert_losses(losses, expected)
    assert_losses(total, expected_total)
    assert_gradient(grad, expected_grad, problem.row_B, True)
    again = problem.run(backend, device)
    assert all(map(torch.equal, again, (total, losses, grad)))


@every_backend
def test_non_contiguous_inputs(backend: str, device: str) -> None:
    problem = Problem()
    expected = problem.run(backend, device)
    problem.out = problem.out.to(memory_format=torch.channels_last)
    problem.x0 = problem.x0.to(memory_format=torch.channels_last)
    problem.row_B = problem.row_B.repeat_interleave(2)[::2]
    problem.address = torch.stack((problem.address, problem.address), 1)[:, 0]
    assert not problem.out.is_contiguous() and not problem.address.is_contiguous()
    for got, wanted in zip(problem.run(backend, device), expected, strict=True):
        assert torch.equal(got, wanted)


@every_backend
@pytest.mark.parametrize("row", [0, 400])
@pytest.mark.parametrize("channel", [0, 3])
def test_not_a_number_is_not_hidden(backend: str, device: str, row: int, channel: int) -> None:
    problem = Problem(rows=(row,))
    problem.out[2, channel, 1, 1] = math.nan
    total, losses, grad = problem.run(backend, device)
    assert math.isnan(total) and math.isnan(losses[0, 2])
    assert torch.isfinite(losses[:, [0, 1, 3]]).all()
    assert math.isnan(grad[2, channel, 1, 1])
    # Nothing but that element, and v's gradient where the error entered it, is spoilt.
    assert grad.isnan().sum() == (2 if channel == 0 else 1)


@every_backend
@pytest.mark.parametrize("wrong", [1000, -1])
def test_a_row_outside_the_table_is_refused(backend: str, device: str, wrong: int) -> None:
    problem = Problem()
    problem.row_B[3] = wrong
    if backend == "triton":
        # A kernel cannot raise without waiting for the host: the loss is no number instead.
        total, losses, _ = problem.run(backend, device)
        assert (
            math.isnan(total) and math.isnan(losses[0, 3]) and torch.isfinite(losses[:, :3]).all()
        )
    elif backend == "cpp":
        with pytest.raises(
            ValueError, match=rf"row_B\[3\] = {wrong} is no row of a table of 1000 rows"
        ):
            problem.run(backend, device)
    else:
        with pytest.raises(IndexError):
            problem.run(backend, device)


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_result_does_not_depend_on_the_number_of_threads(
    on_threads: Callable[..., list[Any]],
) -> None:
    problem = Problem(shape=(5, 3, 70, 70))
    first, *others = on_threads(lambda: problem.run("cpp", "cpu"))
    for result in others:
        assert all(map(torch.equal, first, result))


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpp_cpu, "library_function", functools.partial(cpp_cpu.library_function, isa)
    )
    for case in CASES:
        test_agrees_with_the_reference("cpp", "cpu", case)
    test_likelihood_from_its_centre_to_its_far_tails("cpp", "cpu", 0.3)
