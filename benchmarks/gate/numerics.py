"""Every kernel of a device against the reference in float64, at odd shapes and in all dtypes.

The tolerances are those that the ops promise in their docstrings. Memory that a kernel gets is filled with NaN first,
so that an element it forgets to write cannot pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from speed_kernels import contract
from speed_kernels.adamw_ema import op as adamw
from speed_kernels.loss.op import loss_op
from speed_kernels.noise.op import noise_op
from speed_kernels.noise.op import normals as draw_normals
from speed_kernels.table import epsilon
from torch import Tensor

from benchmarks.harness.measure import GateError
from benchmarks.ops.adamw_ema import gate as adamw_gate
from benchmarks.ops.adamw_ema import providers as optimizers
from benchmarks.ops.diffusion_step.formulas import host_tables, packed_rows, uniform_cdf

ULP = 2.0**-23  # of float32, relative
SHAPES = (
    (1, 4, 32, 32),
    (3, 4, 8, 8),
    (5, 3, 7, 3),
    (2, 1, 1, 1),
    (257, 4, 3, 5),
    (2, 3, 255, 257),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = (0, 2**32 - 1, 2**63 - 1)
ADDRESSES = ((0, 0), (123_456, 2**31 - 300), (2**32 - 1, 7))
ADAMW_SIZES = ((1,), (63, 1025, 4096), (1_000_003,))


def require(condition: bool | Tensor, text: str) -> None:
    """Raises GateError unless `condition` holds (everywhere)."""
    if not bool(condition if isinstance(condition, bool) else condition.all()):
        raise GateError(text)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, fresh memory holds NaN, or a large integer, and not what happens to lie there."""
    originals = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    kept = [(owner, name, getattr(owner, name)) for owner, name in originals]

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

        return filled

    for owner, name, original in kept:
        setattr(owner, name, filling(original))
    try:
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of `dtype` at `expected`, 0 for float32."""
    if dtype == torch.float32:
        return torch.zeros_like(expected)
    facts = torch.finfo(dtype)
    return 0.501 * facts.eps * expected.abs() + facts.smallest_normal * facts.eps


def noise_inputs(
    shape: tuple[int, ...], device: torch.device, num_rows: int, index: int
) -> dict[str, Any]:
    """Tensors and numbers of a noise call; which seed, address and batch is `index`'s choice."""
    generator = torch.Generator().manual_seed(index)
    x0 = torch.randn(shape, generator=generator)
    address = torch.tensor(ADDRESSES[index % len(ADDRESSES)], dtype=torch.int64)
    rows_T8 = packed_rows(host_tables(1000))[torch.arange(num_rows) % 1000]
    cdf_T = uniform_cdf(num_rows)
    return {
        "x0": x0.to(device),
        "cdf_T": cdf_T.to(device),
        "rows_T8": rows_T8.to(device).contiguous(),
        "time_T": torch.arange(num_rows, dtype=torch.float32, device=device) + 0.5,
        "address_2": address.to(device),
        "seed": SEEDS[index % len(SEEDS)],
        "num_slots": (1024, 2**31 - 1, 77)[index % 3],
    }


def noise(device: torch.device, backend: str) -> str:
    """Rows and time equal; x_t within 4 units in the last place of |A x0| + |B eps|, rounded once."""
    worst, count = 0.0, 0
    for index, shape in enumerate(SHAPES):
        for i, x0_dtype in enumerate(DTYPES):
            # All nine pairs of dtypes at the first and the last shape, three at the others.
            some = DTYPES[(index + i) % 3 :][:1]
            for dtype in DTYPES if index in (0, len(SHAPES) - 1) else some:
                inputs = noise_inputs(shape, device, (1000, 7, 1, 33, 16384, 1000)[index], index)
                inputs["x0"] = inputs["x0"].to(x0_dtype)
                stratified = (index + count) % 2 == 0
                with poisoned():
                    x_t, row_B, time_B = noise_op(
                        *inputs.values(), stratified=stratified, dtype=dtype, backend=backend
                    )
                expected, rows, times = noise_op(
                    *inputs.values(),
                    stratified=stratified,
                    dtype=torch.float64,
                    backend="reference",
                )
                name = f"noise {list(shape)} {x0_dtype} -> {dtype}"
                require(torch.equal(row_B, rows), f"{name}: rows differ")
                require(torch.equal(time_B, times), f"{name}: time differs")
                require(x_t.dtype == dtype, f"{name}: x_t is {x_t.dtype}")
                eps = epsilon(inputs["x0"].shape, inputs["address_2"], inputs["seed"])
                column = [inputs["rows_T8"][:, i].double()[rows].view(-1, 1, 1, 1) for i in (0, 1)]
                size = (column[0] * inputs["x0"].double()).abs() + (column[1] * eps).abs()
                excess = (x_t.double() - expected).abs() - rounding(expected, dtype)
                ulps = float((excess / (ULP * size + 1e-38)).max())
                require(ulps <= 4.0, f"{name}: {ulps:.1f} ulp")
                worst, count = max(worst, ulps), count + 1
    return f"{count} combinations, at most {worst:.2f} ulp"


def normals(device: torch.device, backend: str) -> str:
    """The noise itself, a million numbers: every one relatively within 4 units in the last place."""
    worst, shape = 0.0, (4, 4, 256, 256)
    for index in range(3):
        address_2 = torch.tensor(ADDRESSES[index], dtype=torch.int64, device=device)
        with poisoned():
            eps = draw_normals(address_2, shape, seed=SEEDS[index], backend=backend)
        expected = epsilon(torch.Size(shape), address_2, SEEDS[index])
        ulps = float(((eps.double() - expected).abs() / (ULP * expected.abs())).max())
        require(ulps <= 4.0, f"normals: {ulps:.2f} ulp")
        worst = max(worst, ulps)
    return f"at most {worst:.2f} ulp"


def loss(device: torch.device, backend: str) -> str:
    """Losses to 2e-5 (+ 1e-6 bits), gradients to 2e-5 of the sample's largest (1e-3 for v in row 0) plus rounding."""
    count = 0
    for index, shape in enumerate(SHAPES):
        for out_dtype in DTYPES:
            for learned in (False, True):
                _one_loss(device, backend, shape, index, out_dtype, learned)
                count += 1
    return f"{count} combinations"


def _one_loss(
    device: torch.device,
    backend: str,
    shape: tuple[int, ...],
    index: int,
    out_dtype: torch.dtype,
    learned: bool,
) -> None:
    inputs = noise_inputs(shape, device, 1000, index)
    generator = torch.Generator().manual_seed(100 + index)
    out_shape = (shape[0], shape[1] * (2 if learned else 1), *shape[2:])
    out = torch.randn(out_shape, generator=generator).to(device=device, dtype=out_dtype)
    row_B = torch.randint(0, 1000, (shape[0],), generator=generator).to(device)
    row_B[:: max(2, shape[0] // 3)] = 0
    x0 = inputs["x0"].to(DTYPES[index % 3])
    if index % 2:
        x0 = x0.clamp(-1.0, 1.0)  # the outermost bins
    rest = (row_B, inputs["rows_T8"], inputs["address_2"], inputs["seed"], learned, 0.7)
    rest += (index % 2 == 0, 1.0 / shape[0])
    with poisoned():
        total, losses_3B, grad = loss_op(out, x0, *rest, backend)
        again = loss_op(out, x0, *rest, backend)
    total64, losses64, grad64 = loss_op(out.double(), x0, *rest, "reference")
    name = f"loss {list(shape)} {out_dtype} learned_variance={learned}"
    require(grad.dtype == out_dtype, f"{name}: the gradient is {grad.dtype}")
    for first, second in zip((total, losses_3B, grad), again, strict=True):
        require(torch.equal(first, second), f"{name}: two runs differ")
    off = (losses_3B.double() - losses64.double()).abs() - 2e-5 * losses64.double().abs() - 2e-6
    require(off <= 0, f"{name}: losses off by {float(off.max()):.3g}")
    limit = 2e-5 * abs(float(total64)) + 2e-6
    require(abs(float(total) - float(total64)) <= limit, f"{name}: total {float(total)}")
    largest_B = grad64.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    tolerance = torch.full_like(grad64, 2e-5)
    if learned:
        tolerance[:, shape[1] :][row_B == 0] = 1e-3
    error = (grad.double() - grad64).abs() - rounding(grad64, out_dtype) - tolerance * largest_B
    require(error <= 0, f"{name}: gradient off by {float(error.max()):.3g}")


def adamw_ema(device: torch.device, backend: str) -> str:
    """The ops against themselves in float64: all gradient dtypes, with and without second EMA and copies; and
    whole optimizers against AdamW written out."""
    count = 0
    for sizes in ADAMW_SIZES:
        for dtype in DTYPES:
            for extras in (False, True):
                _one_update(device, backend, sizes, dtype, extras)
                count += 1
    adamw_gate.check(optimizers.ours, device, "list", mixed=False)
    for mixed in (False, True):
        adamw_gate.check(optimizers.ours, device, "flat", mixed)
    _not_finite(device, backend)
    return f"{count} combinations, optimizers, gradients that are not finite"


def _one_update(
    device: torch.device, backend: str, sizes: tuple[int, ...], dtype: torch.dtype, extras: bool
) -> None:
    inputs = adamw.sample_inputs(device, sizes)
    inputs.pop("scalars")
    inputs["grads"] = [grad.to(dtype) for grad in inputs["grads"]]
    if not extras:
        inputs["second_emas"], inputs["copies"] = [], []
    wide = {
        key: [
            tensor.double() if key not in ("grads", "copies") else tensor.clone()
            for tensor in tensors
        ]
        for key, tensors in inputs.items()
    }
    before = {key: [tensor.clone() for tensor in tensors] for key, tensors in wide.items()}
    hyper = torch.tensor([1e-3, 0.1, 1e-3, 1e-8, 0.1, 0.5, 0.0, 1e-2, 2.0, 6.94], device=device)
    name = f"adamw_ema {list(sizes)} {dtype} extras={extras}"
    results = []
    for which in (backend, "reference"):
        step, skipped = torch.full((), 4.0, device=device), torch.zeros((), device=device)
        with poisoned():
            square_sum = adamw.grad_square_sum(inputs["grads"], which)
            scalars = adamw.prepare(step, skipped, hyper, square_sum, None, which)
        results.append((square_sum.double(), scalars.double()))
        require(float(step) == 5.0 and float(skipped) == 0.0, f"{name}: counters")
    for found, expected in zip(*results, strict=True):
        require((found - expected).abs() <= 1e-6 * expected.abs(), f"{name}: norm or scalars")
    scalars = results[1][1].float()
    adamw.adamw_ema(**inputs, scalars=scalars, backend=backend)
    adamw.adamw_ema(**wide, scalars=scalars, backend="reference")
    for key in ("params", "exp_avgs", "exp_avg_sqs", "emas", "second_emas"):
        for found, new, old in zip(inputs[key], wide[key], before[key], strict=True):
            limit = 8 * 2.0**-24 * (old.abs() + new.abs()) + 1e-5 * (new - old).abs() + 1e-38
            require((found.double() - new).abs() <= limit, f"{name}: {key}")
    for copy, param in zip(inputs["copies"], inputs["params"], strict=bool(inputs["copies"])):
        require(torch.equal(copy, param.bfloat16()), f"{name}: copies")


def _not_finite(device: torch.device, backend: str) -> None:
    """One NaN or infinity anywhere changes nothing, and is counted."""
    for bad in (float("nan"), float("inf")):
        inputs = adamw.sample_inputs(device, (5, 4099))
        inputs.pop("scalars")
        inputs["grads"][1][4098] = bad
        before = {key: [tensor.clone() for tensor in tensors] for key, tensors in inputs.items()}
        step, skipped = torch.zeros((), device=device), torch.zeros((), device=device)
        hyper = torch.tensor([1e-3, 0.1, 1e-3, 1e-8, 0.1, 1.0, 0.0, 1e-2, 0, 0], device=device)
        square_sum = adamw.grad_square_sum(inputs["grads"], backend)
        scalars = adamw.prepare(step, skipped, hyper, square_sum, None, backend)
        adamw.adamw_ema(**inputs, scalars=scalars, backend=backend)
        require(
            float(step) == 0.0 and float(skipped) == 1.0, "adamw_ema: a bad gradient is not counted"
        )
        for key in ("params", "exp_avgs", "exp_avg_sqs", "emas", "second_emas", "copies"):
            for found, old in zip(inputs[key], before[key], strict=True):
                require(torch.equal(found, old), f"adamw_ema: a bad gradient changed {key}")


def batch_split(device: torch.device, backend: str) -> str:
    """A batch in two halves with shifted addresses is the same batch, bit for bit."""
    inputs = noise_inputs((8, 4, 16, 16), device, 1000, 0)
    whole = noise_op(*inputs.values(), stratified=True, dtype=torch.float32, backend=backend)
    for start, stop in ((0, 3), (3, 8)):
        part = dict(inputs)
        part["x0"] = inputs["x0"][start:stop]
        part["address_2"] = inputs["address_2"] + torch.tensor([0, start], device=device)
        found = noise_op(*part.values(), stratified=True, dtype=torch.float32, backend=backend)
        for name, one, all_of_them in zip(("x_t", "rows", "time"), found, whole, strict=True):
            require(torch.equal(one, all_of_them[start:stop]), f"batch_split: {name} differ")
    return "bit-equal"


def available(op: str, device: torch.device) -> str:
    """The device's fastest backend of `op`. Raises GateError where it cannot run."""
    backend = contract.PREFERRED[device.type][0]
    why_not = contract.unavailable(op, backend, device)
    require(why_not is None, f"{op}: {backend} cannot run: {why_not}")
    return backend
