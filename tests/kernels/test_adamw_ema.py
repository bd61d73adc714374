"""AdamW + EMA: every backend against float64, the guard, clipping, and what the GPU kernels compile to."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from speed_kernels import ahead_of_time, contract
from speed_kernels.adamw_ema import layout, op
from torch import Tensor

SIZES = (1, 63, 257, 1152 * 3 + 1)
HYPER = [1e-2, 0.1, 1e-3, 1e-8, 0.1, 0.0, 0.0, 0.01, 2.0, 6.94]
LISTS = ("params", "exp_avgs", "exp_avg_sqs", "emas", "second_emas", "copies")
BACKENDS = [
    pytest.param(word, device, id=f"{word}-{device}")
    for device in ("cpu", "cuda")
    for word in contract.backends(op.NAME)
    if (device == "cpu" or torch.cuda.is_available())
    and contract.unavailable(op.NAME, word, device) is None
]


def hyper(**changes: float) -> Tensor:
    values = list(HYPER)
    for name, value in changes.items():
        values[getattr(layout, name)] = value
    return torch.tensor(values)


def cast(arguments: dict, dtype: torch.dtype, device: str = "cpu") -> dict:
    """A copy of sample inputs with everything but the bf16 copies in `dtype`."""
    return {
        key: [t.to(device, t.dtype if key == "copies" else dtype, copy=True) for t in value]
        if key in (*LISTS, "grads")
        else value.to(device)
        for key, value in arguments.items()
    }


def steps(arguments: dict, backend: str, hyper: Tensor, grads: list[list[Tensor]], **guard) -> dict:
    """Run the three ops over `grads`; returns the arguments, which the last op has changed, and the counters."""
    device = arguments["params"][0].device
    step, skipped = torch.zeros((), device=device), torch.zeros((), device=device)
    for each in grads:
        each = [grad.to(device) for grad in each]
        square_sum = op.grad_square_sum(each, backend)
        scalars = op.prepare(
            step, skipped, hyper.to(device), square_sum, guard.get("scale"), backend
        )
        op.adamw_ema(**{**arguments, "grads": each, "scalars": scalars}, backend=backend)
    return {**arguments, "step": step, "skipped": skipped}


def gradients(num_steps: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        [(torch.randn(n, generator=generator) * 0.1).to(dtype) for n in SIZES]
        for _ in range(num_steps)
    ]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_follows_float64_for_many_steps(backend: str, device: str, grad_dtype: torch.dtype) -> None:
    sample = op.sample_inputs(sizes=SIZES)
    for copy in sample["copies"]:
        copy.fill_(float("nan"))  # must be overwritten everywhere
    grads, scale = gradients(20, grad_dtype), torch.tensor(0.5)
    exact = steps(cast(sample, torch.float64), "reference", hyper(), grads, scale=scale)
    ours = steps(
        cast(sample, torch.float32, device), backend, hyper(), grads, scale=scale.to(device)
    )
    assert ours["step"].item() == 20
    for key in LISTS[:-1]:
        for got, want in zip(ours[key], exact[key], strict=True):
            torch.testing.assert_close(got.cpu().double(), want, rtol=3e-6, atol=1e-6)
    for copy, param in zip(ours["copies"], ours["params"], strict=True):
        assert torch.equal(copy, param.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e25])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_gradient_that_is_not_finite_moves_nothing(backend: str, device: str, bad: float) -> None:
    arguments = cast(op.sample_inputs(device, SIZES), torch.float32, device)
    before = cast(arguments, torch.float32, device)
    (grads,) = gradients(1)
    grads[-1][-1] = bad
    after = steps(arguments, backend, hyper(), [grads])
    assert all(
        torch.equal(a, b) for key in LISTS for a, b in zip(after[key], before[key], strict=True)
    )
    assert (after["step"].item(), after["skipped"].item()) == (0, 1)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_gradient_scale_that_is_not_finite_moves_nothing(backend: str, device: str) -> None:
    arguments = cast(op.sample_inputs(device), torch.float32, device)
    before = cast(arguments, torch.float32, device)
    scale = torch.tensor(float("inf"), device=device)
    grads = [[grad.clone() for grad in arguments["grads"]]]
    after = steps(arguments, backend, hyper(), grads, scale=scale)
    assert torch.equal(after["params"][1], before["params"][1])
    assert after["step"].item() == 0


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_scalars(backend: str, device: str) -> None:
    """Clipping as in torch.nn.utils.clip_grad_norm_, bias corrections and the three decays, at step 1 and later."""
    for t in (1, 2, 5000):
        step = torch.tensor(t - 1.0, device=device)
        square_sum, scale = torch.tensor(16.0, device=device), torch.tensor(0.5, device=device)
        values = hyper(CLIP_NORM=1.0, EMA_KIND=1.0, EMA_VALUE=1e-4).to(device)
        scalars = op.prepare(step, None, values, square_sum, scale, backend).cpu().double()
        want = {
            layout.APPLY: 1.0,
            layout.GRAD_SCALE: 0.5 / (2.0 + 1e-6),
            layout.GRAD_NORM: 2.0,
            layout.DECAY: 1.0 - 1e-3,
            layout.STEP_SIZE: 1e-2 / (1.0 - 0.9**t),
            layout.DENOM_SCALE: (1.0 - 0.999**t) ** -0.5,
            layout.EMA_WEIGHT: 1.0 - min(0.9999, t / (9.0 + t)),
            layout.SECOND_EMA_WEIGHT: 1.0 - (1.0 - 1.0 / t) ** 7.94,
        }
        for index, value in want.items():
            assert scalars[index].item() == pytest.approx(value, rel=1e-6), index
        values = hyper(EMA_KIND=3.0, EMA_VALUE=math.log(2) / 200).to(device)
        half_life = op.prepare(step.clone() - 1, None, values, None, None, backend)
        want_weight = 1 - 0.5 ** (1 / max(min(200, 0.05 * (t - 1)), 1e-8))
        assert half_life[layout.EMA_WEIGHT].item() == pytest.approx(want_weight, rel=1e-6)
        constant = op.prepare(step, None, hyper().to(device), None, None, backend)
        assert constant[layout.EMA_WEIGHT].item() == pytest.approx(0.01)
        assert step.item() == t + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_sum_of_squares(backend: str, device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator).to(dtype) for n in (*SIZES, 100_003)]
    if dtype == torch.float16:
        grads[0].fill_(6e-8)  # subnormal
    want = sum(grad.double().square().sum().item() for grad in grads)
    on_device = [grad.to(device) for grad in grads]
    got = op.grad_square_sum(on_device, backend)
    assert got.item() == pytest.approx(want, rel=1e-6)
    assert torch.equal(got, op.grad_square_sum(on_device, backend))
    if dtype == torch.float16:
        alone = op.grad_square_sum(on_device[:1], backend).item()
        assert alone == pytest.approx(grads[0].double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("sizes", [(70_001,), (1, 33_000, 36_999, 1), (35_000, 35_001)])
@pytest.mark.parametrize("threads", [1, 2])
def test_cpp_does_not_depend_on_cuts_or_threads(sizes: tuple[int, ...], threads: int) -> None:
    """ZeRO cuts the same elements differently at every world size; the bits must not change."""
    whole = op.sample_inputs(sizes=(70_001,))
    expected = cast(whole, torch.float32)
    op.adamw_ema(**expected, backend="cpp")
    pieces = {
        key: [part.clone() for part in value[0].split(sizes)] if key != "scalars" else value
        for key, value in whole.items()
    }
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        op.adamw_ema(**pieces, backend="cpp")
    finally:
        torch.set_num_threads(before)
    for key in LISTS:
        assert torch.equal(torch.cat(pieces[key]), expected[key][0]), key


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_optional_streams_may_be_absent(backend: str) -> None:
    full, bare = op.sample_inputs(), op.sample_inputs()
    op.adamw_ema(**full, backend=backend)
    op.adamw_ema(**{**bare, "second_emas": [], "copies": []}, backend=backend)
    for key in LISTS[:4]:
        assert all(torch.equal(a, b) for a, b in zip(full[key], bare[key], strict=True))


def test_refusals() -> None:
    sample = op.sample_inputs(sizes=(6,))

    def call(**changes) -> None:
        op.adamw_ema(**{**sample, **changes}, backend="cpp")

    strided = torch.zeros(12)[::2]
    with pytest.raises(ValueError, match=r"params\[0\] is not contiguous"):
        call(params=[strided])
    with pytest.raises(ValueError, match=r"grads\[0\] is not contiguous"):
        call(grads=[strided])
    with pytest.raises(ValueError, match="emas has 0 tensors for 1"):
        call(emas=[])
    with pytest.raises(ValueError, match=r"exp_avgs\[0\] is \[5\]"):
        call(exp_avgs=[torch.zeros(5)])
    with pytest.raises(ValueError, match=r"params\[0\] is torch.bfloat16"):
        call(params=[torch.zeros(6, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match=r"copies\[0\] is torch.float16"):
        call(copies=[torch.zeros(6, dtype=torch.float16)])
    with pytest.raises(ValueError, match="scalars must be float32"):
        call(scalars=torch.zeros(3))
    with pytest.raises(ValueError, match="hyper must be float32"):
        op.prepare(torch.zeros(()), None, torch.zeros(3), None, None, "cpp")
    with pytest.raises(ValueError, match="at least one gradient"):
        op.grad_square_sum([], "cpp")


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend: str, device: str) -> None:
    sample = op.sample_inputs(device)
    step, skipped = torch.zeros((), device=device), torch.zeros((), device=device)
    square_sum = torch.ones((), device=device)
    torch.library.opcheck(op.adamw_ema, (*sample.values(), backend))
    torch.library.opcheck(op.grad_square_sum, (sample["grads"], backend))
    torch.library.opcheck(
        op.prepare, (step, skipped, hyper().to(device), square_sum, None, backend)
    )


def test_compiles_as_one_graph() -> None:
    def update(arguments: dict, step: Tensor, values: Tensor) -> None:
        square_sum = op.grad_square_sum(arguments["grads"], "cpp")
        scalars = op.prepare(step, None, values, square_sum, None, "cpp")
        op.adamw_ema(**{**arguments, "scalars": scalars}, backend="cpp")

    eager, compiled = op.sample_inputs(), op.sample_inputs()
    update(eager, torch.zeros(()), hyper())
    step = torch.zeros(())
    torch.compile(update, fullgraph=True, backend="aot_eager")(compiled, step, hyper())
    assert step.item() == 1
    for key in LISTS:
        assert all(torch.equal(a, b) for a, b in zip(eager[key], compiled[key], strict=True)), key


INTERPRETED = """
import torch
from speed_kernels.adamw_ema import cpp_cpu, layout, op, triton_gpu
# A flat buffer is one kernel, a list of tensors (here of sizes that are and are not aligned) another.
for grad_dtype, sizes in (
    (torch.float32, (1057,)),
    (torch.bfloat16, (1057,)),
    (torch.float32, (1, 1057, 64, 2048)),
    (torch.bfloat16, (1, 1057, 64, 2048)),
):
    want, got = op.sample_inputs(sizes=sizes), op.sample_inputs(sizes=sizes)
    grads = [grad.to(grad_dtype) for grad in want["grads"]]
    square_sum = triton_gpu.grad_square_sum(grads)
    torch.testing.assert_close(square_sum, cpp_cpu.grad_square_sum(grads))
    hyper = torch.tensor([1e-2, 0.1, 1e-3, 1e-8, 0.1, 1.0, 1.0, 1e-4, 2.0, 6.94])
    half_life = torch.tensor([1e-2, 0.1, 1e-3, 1e-8, 0.1, 1.0, 3.0, 0.7, 3.0, 1e-3])
    for start in (0.0, 41.0):
        pair = [
            module.prepare(torch.tensor(start), None, half_life, None, None)
            for module in (triton_gpu, cpp_cpu)
        ]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=0.0)
        step, other, skipped = torch.tensor(start), torch.tensor(start), torch.zeros(())
        scalars = triton_gpu.prepare(step, skipped, hyper, square_sum, torch.tensor(0.5))
        expected = cpp_cpu.prepare(other, None, hyper, square_sum, torch.tensor(0.5))
        torch.testing.assert_close(scalars, expected, rtol=1e-6, atol=0.0)
        assert step.item() == other.item() == start + 1 and skipped.item() == 0
    for module, sample in ((triton_gpu, got), (cpp_cpu, want)):
        module.adamw_ema(*list({**sample, "grads": grads, "scalars": expected}.values()))
    for key in ("params", "exp_avgs", "exp_avg_sqs", "emas", "second_emas"):
        for a, b in zip(got[key], want[key]):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    before = [param.clone() for param in got["params"]]
    for bad in (float("nan"), float("inf")):
        scalars = triton_gpu.prepare(step, skipped, hyper, torch.tensor(bad), None)
        triton_gpu.adamw_ema(*list({**got, "grads": grads, "scalars": scalars}.values()))
    assert skipped.item() == 2 and step.item() == 42
    assert all(torch.equal(a, b) for a, b in zip(before, got["params"]))
print("equal")
"""


@pytest.mark.skipif(ahead_of_time.unavailable() is not None, reason="no triton")
@pytest.mark.slow
def test_triton_in_the_interpreter() -> None:
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert answer.stdout.strip() == "equal", answer.stderr
