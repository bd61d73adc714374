"""What only a CUDA device can show: nothing waits, graphs replay exactly, addresses beyond 2^31 elements are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from speed_kernels import philox
from speed_kernels.adamw_ema import op as adamw
from speed_kernels.adamw_ema.layout import Ema
from speed_kernels.adamw_ema.optimizer import AdamWEMA
from speed_kernels.loss.op import diffusion_loss, loss_op
from speed_kernels.noise.op import noise_op
from torch import Tensor

from benchmarks.gate.numerics import noise_inputs, require
from benchmarks.harness.counts import refuse_waiting

GIB = 2**30
# Just beyond 2^31 elements, at odd sizes: a batch, one sample, one flat buffer.
BATCH, SAMPLE = 33, (1, 2**13 + 1, 2**13 - 1)
WIDE_SAMPLE = 2**31 + 4100
WIDE_BUFFER = 2**31 + 4099


def diffusion_step(
    device: torch.device, backend: str, address_2: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Advance the step on the device, then noise, loss and gradient: (x_t, row_B, total, losses_3B, gradient)."""
    inputs = noise_inputs((16, 4, 32, 32), device, 1000, 0)
    inputs["address_2"] = address_2
    out = torch.randn(
        16, 8, 32, 32, device=device, generator=torch.Generator(device).manual_seed(3)
    )
    out = out.bfloat16().requires_grad_()
    next_step = torch.tensor([1, 0], device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)

    def run() -> tuple[Tensor, ...]:
        address_2.add_(next_step)
        x_t, row_B, _ = noise_op(
            *inputs.values(), stratified=True, dtype=torch.bfloat16, backend=backend
        )
        total, losses_3B = diffusion_loss(
            out,
            inputs["x0"],
            row_B,
            inputs["rows_T8"],
            address_2,
            seed=inputs["seed"],
            learned_variance=True,
            unit_upstream=True,
            ticket=ticket,
            backend=backend,
        )
        (grad,) = torch.autograd.grad(total, out)
        return x_t, row_B, total.detach(), losses_3B, grad

    return run


def make_optimizer(device: torch.device, backend: str) -> AdamWEMA:
    """Guard, clipping and two EMAs over three tensors with fixed gradients."""
    generator = torch.Generator(device).manual_seed(4)
    params = [
        torch.randn(n, device=device, generator=generator).requires_grad_() for n in (7, 65, 4099)
    ]
    for param in params:
        param.grad = torch.randn(param.shape, device=device, generator=generator)
    return AdamWEMA(params, 1e-3, clip_norm=1.0, ema=(Ema("warmup"), Ema("power")), backend=backend)


def optimizer_tensors(optimizer: AdamWEMA) -> list[Tensor]:
    """Weights and all state, in a fixed order."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            found += [
                param.detach(),
                *(optimizer.state[param][key] for key in sorted(optimizer.state[param])),
            ]
    return found


def nothing_waits(device: torch.device, backend: str) -> str:
    """All three ops and the optimizer run where torch forbids every host synchronisation."""
    step = diffusion_step(device, backend, torch.zeros(2, dtype=torch.int64, device=device))
    optimizer = make_optimizer(device, backend)
    for call in (step, optimizer.step):
        call()  # compiles, and uploads the optimizer's numbers
        refuse_waiting(call)
    return "no host synchronisation"


def graphs(device: torch.device, backend: str) -> str:
    """Captured steps replay with new steps of the address and of the optimizer, equal to eager ones bit for bit."""
    address_2 = torch.zeros(2, dtype=torch.int64, device=device)
    replayed, captured_step = captured(diffusion_step(device, backend, address_2))
    eager = diffusion_step(device, backend, torch.zeros(2, dtype=torch.int64, device=device))
    address_2.zero_()
    for _ in range(3):
        captured_step.replay()
        expected = eager()
        for name, found, value in zip(
            ("x_t", "rows", "total", "losses", "gradient"), replayed, expected, strict=True
        ):
            require(torch.equal(found, value), f"graphs: {name} of the replayed step differs")
    optimizer, twin = make_optimizer(device, backend), make_optimizer(device, backend)
    _, captured_update = captured(optimizer.step)
    optimizer.refresh()  # tells the graph where its tensors are
    for _ in range(3):  # the calls before the capture were steps, too
        twin.step()
    for _ in range(3):
        captured_update.replay()
        twin.step()
        for found, value in zip(optimizer_tensors(optimizer), optimizer_tensors(twin), strict=True):
            require(torch.equal(found, value), "graphs: the replayed optimizer step differs")
    return "3 replays each, bit-equal"


def captured(call: Callable[[], Any]) -> tuple[Any, torch.cuda.CUDAGraph]:
    """(result of the captured call, its graph), after three eager calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return result, graph


def room(needed_gib: int, device: torch.device) -> str | None:
    """Why there is not enough free memory, or None."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return f"{free // GIB} GiB free, {needed_gib} needed" if free < needed_gib * GIB else None


def many_samples(device: torch.device, backend: str) -> str:
    """A batch of more than 2^31 elements: its last sample equals that sample alone."""
    why_not = room(22, device)
    if why_not:
        return f"skipped: {why_not}"
    batch = BATCH
    inputs = noise_inputs((1, *SAMPLE), device, 1000, 0)
    last = inputs["x0"].bfloat16()
    x0 = torch.zeros(batch, *SAMPLE, dtype=torch.bfloat16, device=device)
    x0[-1] = last[0]
    whole = dict(inputs) | {"x0": x0}
    alone = dict(inputs) | {
        "x0": last,
        "address_2": inputs["address_2"] + torch.tensor([0, batch - 1], device=device),
    }
    options = {"stratified": True, "dtype": torch.bfloat16, "backend": backend}
    x_t, row_B, _ = noise_op(*whole.values(), **options)
    x_t_1, row_1, _ = noise_op(*alone.values(), **options)
    require(torch.equal(row_B[-1:], row_1), "many_samples: the last row differs")
    require(torch.equal(x_t[-1:], x_t_1), "many_samples: the last x_t differs")
    # The network's output is x_t itself: any numbers do.
    tail = (inputs["seed"], False, 1.0, False, 1.0, backend)
    _, losses_3B, grad = loss_op(x_t, x0, row_B, inputs["rows_T8"], whole["address_2"], *tail)
    _, losses_31, grad_1 = loss_op(x_t_1, last, row_1, inputs["rows_T8"], alone["address_2"], *tail)
    require(torch.equal(grad[-1:], grad_1), "many_samples: the last gradient differs")
    close = (losses_3B[:, -1:] - losses_31).abs() <= 1e-5 * losses_31.abs()
    require(close, "many_samples: the last losses differ")
    return f"{x0.numel()} elements"


def one_wide_sample(device: torch.device, backend: str) -> str:
    """One sample of more than 2^31 elements: its end has the noise of its own addresses."""
    why_not = room(12, device)
    if why_not:
        return f"skipped: {why_not}"
    num, tail = WIDE_SAMPLE, 4096
    inputs = noise_inputs((1, 1), device, 1, 0)
    inputs["x0"] = torch.zeros(1, num, dtype=torch.bfloat16, device=device)
    inputs["rows_T8"] = torch.tensor([[0.0, 1.0, 0, 1, 1, 0, 0, 0]], device=device)
    x_t, _, _ = noise_op(*inputs.values(), stratified=False, dtype=torch.bfloat16, backend=backend)
    bits = philox.random_bits(
        inputs["seed"],
        inputs["address_2"][0],
        inputs["address_2"][1:],
        philox.STREAM_EPS,
        tail // 4,
        first_block=(num - tail) // 4,
    )
    expected = philox.box_muller(bits).flatten()
    error = (x_t[0, -tail:].double() - expected).abs()
    require(error <= 0.51 * 2.0**-7 * expected.abs() + 1e-30, "one_wide_sample: the end differs")
    return f"{num} elements"


def wide_update(device: torch.device, backend: str) -> str:
    """A flat buffer of more than 2^31 parameters: its end is updated as it is alone."""
    why_not = room(50, device)
    if why_not:
        return f"skipped: {why_not}"
    num, tail = WIDE_BUFFER, 5000
    names = ("params", "exp_avgs", "exp_avg_sqs", "emas")
    tensors = {name: [torch.full((num,), 0.5, device=device)] for name in names}
    grads = [torch.full((num,), 0.25, dtype=torch.bfloat16, device=device)]
    generator = torch.Generator(device).manual_seed(5)
    for (tensor,) in (*tensors.values(), grads):
        end = torch.rand(tail, device=device, generator=generator)
        tensor[-tail:] = end.to(tensor.dtype)
    alone = {name: [tensor[-tail:].clone()] for name, (tensor,) in tensors.items()}
    hyper = torch.tensor([1e-3, 0.1, 1e-3, 1e-8, 0.1, 0, 0, 1e-2, 0, 0], device=device)
    step = torch.zeros((), device=device)
    scalars = adamw.prepare(step, None, hyper, None, None, backend)
    rest = {"second_emas": [], "copies": [], "scalars": scalars, "backend": backend}
    adamw.adamw_ema(**tensors, grads=grads, **rest)
    adamw.adamw_ema(**alone, grads=[grads[0][-tail:].clone()], **rest)
    for name in names:
        require(
            torch.equal(tensors[name][0][-tail:], alone[name][0]), f"wide_update: {name} differ"
        )
    square_sum = float(adamw.grad_square_sum(grads, backend))
    expected = 0.0625 * (num - tail) + float(grads[0][-tail:].double().square().sum())
    require(abs(square_sum - expected) <= 1e-5 * expected, f"wide_update: sum {square_sum:.9g}")
    return f"{num} parameters"
