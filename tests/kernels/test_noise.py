"""The noise op: every backend against the reference, invariance to cutting the batch, autograd, compile, refusals."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_kernels import philox
from speed_kernels import table as table_module
from speed_kernels.noise import cpp_cpu, reference
from speed_kernels.noise.op import noise, noise_op, sample_inputs
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Backend and device. Triton's kernels run on the CPU in the interpreter, in a process of their own (see the last test).
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
CASES = range(len(list(sample_inputs())))
# The interpreter rounds to bfloat16 towards zero.
ULPS = 2.0 if INTERPRETING else 1.0

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def to(device: str, *values: Any) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


def table(num_rows: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """A table whose first columns are those of a variance-preserving schedule, with a density that is not flat."""
    angle = torch.linspace(0.02, math.pi / 2 - 0.02, num_rows, dtype=torch.float64)
    rows = torch.zeros(num_rows, 8, dtype=torch.float64)
    rows[:, 0], rows[:, 1] = angle.cos(), angle.sin()
    cdf = (torch.linspace(0, 1, num_rows + 1, dtype=torch.float64)[1:] ** 2 * 2**32).round().long()
    return cdf, rows.float(), torch.arange(num_rows, dtype=torch.float32) / num_rows


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def run(
    backend: str, device: str, x0: Tensor, first_slot: int = 0, **options: Any
) -> tuple[Tensor, ...]:
    options = {"seed": 77, "num_slots": 64, "step": 5, **options}
    address = torch.tensor([options.pop("step"), first_slot])
    tensors = to(device, x0, *table(), address)
    return noise(*tensors, backend=backend, **options)


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(backend: str, device: str, case: int) -> None:
    args = list(sample_inputs())[case]
    x0, dtype, given = args[0], args[8], args[10:]  # with or without rows
    x_t, row_B, time_B = noise_op(*to(device, *args[:9], backend, *given))
    exact_args: list[Any] = [*args[:8], torch.float64, *given]
    exact, exact_row_B, exact_time_B = reference.noise(*exact_args)
    assert torch.equal(row_B.cpu(), exact_row_B) and torch.equal(time_B.cpu(), exact_time_B)
    assert x_t.dtype == dtype and x_t.shape == x0.shape and x_t.is_contiguous()
    eps = table_module.epsilon(x0.shape, args[4], args[5])
    a, b = (table_module.column(args[2], exact_row_B, index, x0) for index in (0, 1))
    scale = (a * x0.double()).abs() + (b * eps).abs()
    bound = 4 * 2.0**-24 * scale + ULPS * 0.51 * torch.finfo(dtype).eps * exact.abs()
    assert ((x_t.cpu().double() - exact).abs() <= bound).all()


@every_backend
def test_noise_is_accurate_relative_to_its_own_size(backend: str, device: str) -> None:
    """Also the smallest and the largest normals: no absolute error hides in them."""
    cdf, rows, tau = torch.tensor([2**32]), torch.zeros(1, 8), torch.zeros(1)
    rows[0, 1] = 1.0
    shape = (2, 1000) if INTERPRETING else (16, 2**16)
    address = torch.tensor(
        [2**33 + 3, 2**32 - 2]
    )  # step and slots beyond 32 bits wrap alike everywhere
    args = (torch.zeros(shape), cdf, rows, tau, address, 2**63 - 1, 2**31 - 1, False)
    got = noise_op(*to(device, *args), torch.float32, backend)[0].cpu().double()
    exact = reference.noise(*args, torch.float64)[0]
    error = ((got - exact) / exact).abs().max().item()
    assert error < 5 * 2.0**-23, f"relative error {error / 2.0**-23:.1f} units in the last place"


@every_backend
@pytest.mark.parametrize("stratified", [True, False])
def test_any_cut_of_the_batch_gives_the_same_samples(
    backend: str, device: str, stratified: bool
) -> None:
    x0 = batch((5 if INTERPRETING else 12, 3, 5, 7))
    whole = run(backend, device, x0, 20, stratified=stratified)
    for cuts in [(1, 4), (3, 0, 2)] if INTERPRETING else [(4, 4, 4), (1, 11), (5, 0, 7)]:
        first, parts = 0, []
        for size in cuts:
            part = x0[first : first + size]
            parts.append(run(backend, device, part, 20 + first, stratified=stratified))
            first += size
        for index, tensor in enumerate(whole):
            assert torch.equal(tensor, torch.cat([part[index] for part in parts]))


@every_backend
def test_step_seed_and_slot_change_everything(backend: str, device: str) -> None:
    x0 = torch.zeros(2, 1, 40, 40) if not INTERPRETING else torch.zeros(2, 1, 8, 8)
    base = run(backend, device, x0)[0].cpu()
    variants = ({"step": 6}, {"seed": 78}, {"seed": 77 + 2**32}, {"first_slot": 2})
    others = [run(backend, device, x0, **variant)[0].cpu() for variant in variants]
    for other in others:
        assert (base == other).float().mean() < 0.01
    assert (base[0] == base[1]).float().mean() < 0.01


@every_backend
def test_non_contiguous_inputs(backend: str, device: str) -> None:
    x0 = batch((4, 6, 6, 3)).permute(0, 3, 1, 2)
    assert not x0.is_contiguous()
    cdf, rows, tau = table()
    wide_rows = torch.zeros(100, 16)
    wide_rows[:, ::2] = rows
    tensors = (
        x0,
        torch.stack((cdf, cdf), 1)[:, 0],
        wide_rows[:, ::2],
        torch.stack((tau, tau), 1)[:, 1],
    )
    address = torch.tensor([5, -1, 0, -1])[::2]
    strided = noise(*to(device, *tensors, address), seed=77, num_slots=64, backend=backend)
    for got, expected in zip(strided, run(backend, device, x0.contiguous()), strict=True):
        assert torch.equal(got, expected) and got.is_contiguous()


@every_backend
def test_shapes_with_nothing_in_them(backend: str, device: str) -> None:
    x_t, row_B, time_B = run(backend, device, torch.empty(0, 4, 8, 8))
    assert x_t.shape == (0, 4, 8, 8) and row_B.shape == time_B.shape == (0,)
    x_t, row_B, _ = run(backend, device, torch.empty(3, 0, 8))
    assert x_t.shape == (3, 0, 8)
    assert torch.equal(row_B, run(backend, device, torch.zeros(3, 1))[1])


@every_backend
def test_long_samples_of_odd_length(backend: str, device: str) -> None:
    x0 = batch((2, 2111) if INTERPRETING else (3, 70001))
    x_t, row_B, _ = run(backend, device, x0)
    exact, exact_row_B, _ = run("reference", "cpu", x0)
    assert torch.equal(row_B.cpu(), exact_row_B)
    torch.testing.assert_close(x_t.cpu(), exact, rtol=2e-6, atol=2e-6)


@every_backend
@pytest.mark.parametrize(
    "num_rows", [1, 17, 257, 16384] if INTERPRETING else [1, 16, 17, 255, 256, 257, 1000, 16384]
)
def test_rows_are_bit_equal_for_tables_of_any_length(
    backend: str, device: str, num_rows: int
) -> None:
    density = torch.rand(num_rows, generator=torch.Generator().manual_seed(num_rows)).double()
    density[num_rows // 2 : num_rows // 2 + 3] = 0 if num_rows > 8 else 1
    cdf = (density.cumsum(0) / density.sum() * 2**32).round().long()
    cdf[-1] = 2**32
    size = 6 if INTERPRETING else 512
    args = (torch.zeros(size, 1), cdf, torch.zeros(num_rows, 8), torch.arange(num_rows).float())
    for stratified, num_slots in ((True, size), (True, 2**31 - 1), (False, size)):
        address = torch.tensor([3, num_slots - size])
        row_B = noise(
            *to(device, *args, address),
            seed=1,
            num_slots=num_slots,
            stratified=stratified,
            backend=backend,
        )[1]
        slot_B = num_slots - size + torch.arange(size)
        expected = philox.row_draw(1, 3, slot_B, cdf, num_slots, stratified)
        assert torch.equal(row_B.cpu(), expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_by_x0_is_the_scale(backend: str, device: str, dtype: torch.dtype) -> None:
    x0 = batch((4, 3, 2, 2), dtype).to(device).requires_grad_()
    x_t, row_B, time_B = run(backend, device, x0, dtype=torch.float32)
    assert not row_B.requires_grad and not time_B.requires_grad
    upstream = batch((4, 3, 2, 2)).to(device)
    x_t.backward(upstream)
    scale = table()[1][:, 0].to(device)[row_B].view(-1, 1, 1, 1)
    assert x0.grad is not None and x0.grad.dtype == dtype
    assert torch.equal(x0.grad, (upstream * scale).to(dtype))


def test_gradcheck() -> None:
    x0 = batch((2, 3)).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: run("reference", "cpu", x, dtype=torch.float64)[0], (x0,)
    )


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
@every_backend
@pytest.mark.parametrize("case", CASES)
def test_opcheck(backend: str, device: str, case: int) -> None:
    values = list(sample_inputs())[case]
    args = to(device, *values[:9], backend, *values[10:])
    torch.library.opcheck(noise_op, (args[0].requires_grad_(), *args[1:]))


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
@every_backend
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x0 = batch((4, 3, 4, 4)).to(device)
    for got, expected in zip(compiled(backend, device, x0), run(backend, device, x0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_result_does_not_depend_on_the_number_of_threads(
    on_threads: Callable[..., list[Any]],
) -> None:
    x0 = batch((5, 4, 64, 64))
    first, *others = on_threads(lambda: run("cpp", "cpu", x0))
    for result in others:
        assert all(map(torch.equal, first, result))


@pytest.mark.skipif(INTERPRETING, reason="C++")
@pytest.mark.parametrize("case", CASES)
def test_every_instruction_set(isa: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpp_cpu, "library_functions", functools.partial(cpp_cpu.library_functions, isa)
    )
    test_agrees_with_the_reference("cpp", "cpu", case)


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_every_float16_and_bfloat16_is_converted_exactly() -> None:
    """A = 1, B = 0: the op copies between element types, as torch does."""
    cdf, rows, tau = torch.tensor([2**32]), torch.zeros(1, 8), torch.zeros(1)
    rows[0, 0] = 1.0
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    floats = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(
        2**16
    ).remainder(77).sub(38)
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.9, 65520.0, 6e-8, 2e-8]
    )

    def copy(x: Tensor, dtype: torch.dtype) -> Tensor:
        address = torch.tensor([0, 0])
        return noise(
            x[None], cdf, rows, tau, address, seed=0, num_slots=1, dtype=dtype, backend="cpp"
        )[0][0]

    for dtype in (torch.float16, torch.bfloat16):
        halves = every.view(dtype)
        torch.testing.assert_close(
            copy(halves, torch.float32), halves.float(), rtol=0, atol=0, equal_nan=True
        )
        for values in (floats, special, torch.nextafter(halves.float(), torch.tensor(math.inf))):
            torch.testing.assert_close(
                copy(values, dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True
            )


REFUSALS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("no batch dimension", lambda a: a.update(x0=torch.zeros(()))),
    ("x0 is torch.float64", lambda a: a.update(x0=torch.zeros(2, 2).double(), dtype=torch.float32)),
    ("x0 is torch.int64", lambda a: a.update(x0=torch.zeros(2, 2).long(), dtype=torch.float32)),
    ("cdf_T is torch.float32", lambda a: a.update(cdf_T=a["cdf_T"].float())),
    (r"cdf_T is torch.int64 \(99,\)", lambda a: a.update(cdf_T=a["cdf_T"][1:])),
    ("rows_T8 is", lambda a: a.update(rows_T8=a["rows_T8"][:, :7])),
    ("time_T is torch.float64", lambda a: a.update(time_T=a["time_T"].double())),
    ("address_2 is torch.int32", lambda a: a.update(address_2=a["address_2"].int())),
    ("address_2 is on meta", lambda a: a.update(address_2=a["address_2"].to("meta"))),
    ("seed=-1", lambda a: a.update(seed=-1)),
    ("num_slots=0", lambda a: a.update(num_slots=0)),
    ("dtype=torch.float64", lambda a: a.update(dtype=torch.float64)),
]


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
@pytest.mark.parametrize(("message", "change"), REFUSALS)
def test_wrong_arguments_are_refused(message: str, change: Callable[[dict[str, Any]], Any]) -> None:
    cdf, rows, tau = table()
    arguments: dict[str, Any] = {
        "x0": torch.zeros(2, 3), "cdf_T": cdf, "rows_T8": rows, "time_T": tau, "address_2": torch.tensor([0, 0]),
        "seed": 1, "num_slots": 4, "dtype": None,
    }  # fmt: skip
    change(arguments)
    with pytest.raises(ValueError, match=message):
        noise(**arguments, backend="cpp")


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter")
def test_addresses_of_64_bits_and_tiles_in_turn() -> None:
    """WIDE changes how offsets are computed, not what they are; nor does a program that takes two tiles."""
    from speed_kernels.noise import triton_gpu

    cdf, rows, tau = table()
    x0, address = batch((2, 1500)), torch.tensor([5, 0])
    x_t, row_B, time_B = torch.empty_like(x0), torch.empty(2, dtype=torch.int64), torch.empty(2)
    kernel: Any = triton_gpu.noise_kernel[(2,)]
    kernel(
        x0, x_t, cdf, cdf, rows, tau, address, row_B, time_B, 1500, 100, 77, 0, 64, philox.stratum_stride(64), 1, 2,
        ROWS="drawn", STRATIFIED=True, FANOUT=16, TILE=1024, RUN=4, WIDE=True,
    )  # fmt: skip
    for got, expected in zip((x_t, row_B, time_B), run("triton", "cpu", x0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
@pytest.mark.parametrize("num_elements", [1, 2, 4, 5, 8, 9, 16, 17, 31])
def test_samples_of_a_few_elements_have_the_numbers_of_large_ones(num_elements):
    """They share vectors in C++; a sample's noise depends on its address alone, bit by bit."""
    address_2 = torch.tensor([7, 2**31 - 100])
    few, many = (cpp_cpu.normals(address_2, (300, n), 11) for n in (num_elements, 600))
    assert torch.equal(few, many[:, :num_elements])
    later = address_2 + torch.tensor([0, 131])
    assert torch.equal(cpp_cpu.normals(later, (20, num_elements), 11), few[131:151])
