"""noise_at and normals: the noise op at rows that somebody else chose, and the noise alone, on every backend.

Agreement of noise_at with the reference, and opcheck, are among the cases of test_noise.py.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_kernels import philox
from speed_kernels.noise import cpp_cpu
from speed_kernels.noise.op import noise, noise_at, noise_op, normals, normals_op
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
SEED = 2**40 + 9
# Batches that are a vector, of odd lengths, of several tiles, and with nothing in them.
SHAPES = [(7,), (3, 1), (5, 3, 7, 3), (2, 2111), (4, 16, 16), (0, 4, 2), (3, 0, 2)]

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def table() -> tuple[Tensor, Tensor]:
    """Twenty rows and what the network is told of them; the fourth row is that of noise alone."""
    rows_T8 = (torch.arange(160) * 37 % 101 / 101).view(20, 8)
    rows_T8[3, 0], rows_T8[3, 1] = 0.0, 1.0
    return rows_T8, torch.arange(20) / 20


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def chosen(size: int) -> Tensor:
    return torch.arange(size) * 7 % 20


def run(
    backend: str, device: str, x0: Tensor, row_B: Tensor, slot: int = 4, **options: Any
) -> tuple[Tensor, ...]:
    tensors = (x0, row_B, *table(), torch.tensor([11, slot]))
    moved = (tensor.to(device) for tensor in tensors)
    return noise_at(*moved, seed=SEED, backend=backend, **options)


def plain(
    backend: str, device: str, shape: tuple[int, ...], slot: int = 4, **options: Any
) -> Tensor:
    address_2 = torch.tensor([options.pop("step", 11), slot], device=device)
    return normals(address_2, shape, seed=options.pop("seed", SEED), backend=backend)


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stratified", [True, False])
def test_drawn_rows_that_are_given_again_change_no_bit(
    backend: str, device: str, shape: tuple[int, ...], stratified: bool
) -> None:
    cdf_T = (torch.linspace(0, 1, 21, dtype=torch.float64)[1:] ** 2 * 2**32).round().long()
    x0, address_2 = batch(shape).to(device), torch.tensor([11, 4], device=device)
    rows_T8, time_T = (tensor.to(device) for tensor in table())
    options: dict[str, Any] = {"num_slots": 16, "stratified": stratified, "dtype": torch.bfloat16}
    drawn = noise(
        x0, cdf_T.to(device), rows_T8, time_T, address_2, seed=SEED, backend=backend, **options
    )
    given = run(backend, device, x0, drawn[1], dtype=torch.bfloat16)
    assert all(map(torch.equal, given, drawn))


@every_backend
def test_any_rows_in_any_order(backend: str, device: str) -> None:
    """Equal ones, the first and the last; each sample's is its own, and the given tensor is left alone."""
    row_B = torch.tensor([19, 0, 7, 7, 7, 0, 12])
    given = row_B.to(device)
    x_t, used_B, time_B = run(backend, device, batch((7, 30)), given)
    assert torch.equal(used_B.cpu(), row_B) and torch.equal(given.cpu(), row_B)
    assert used_B.data_ptr() != given.data_ptr()
    assert torch.equal(time_B.cpu(), table()[1][row_B])
    for sample in range(7):
        part = slice(sample, sample + 1)
        alone = run(backend, device, batch((7, 30))[part], row_B[part], slot=4 + sample)
        assert torch.equal(alone[0], x_t[part])


@every_backend
def test_strided_tensors(backend: str, device: str) -> None:
    x0, row_B = batch((6, 5, 3)), chosen(6)
    expected = run(backend, device, x0, row_B)
    spread = torch.stack((row_B, row_B - 100), 1)[:, 0]
    got = run(backend, device, x0.transpose(1, 2).contiguous().transpose(1, 2), spread)
    assert not spread.is_contiguous()
    assert all(map(torch.equal, got, expected)) and all(t.is_contiguous() for t in got)


@every_backend
def test_gradient_is_the_scale_of_the_given_row(backend: str, device: str) -> None:
    x0 = batch((5, 2, 3), torch.bfloat16).to(device).requires_grad_()
    x_t, row_B, time_B = run(backend, device, x0, chosen(5), dtype=torch.float32)
    assert not row_B.requires_grad and not time_B.requires_grad
    upstream = batch((5, 2, 3)).to(device)
    x_t.backward(upstream)
    scale = table()[0][chosen(5), 0].to(device).view(5, 1, 1)
    assert x0.grad is not None and torch.equal(x0.grad, (upstream * scale).bfloat16())


@every_backend
@pytest.mark.parametrize("wrong", [20, -1, 2**40])
def test_a_row_outside_the_table(backend: str, device: str, wrong: int) -> None:
    row_B = chosen(5)
    row_B[2] = wrong
    if backend == "triton":
        # A kernel cannot raise without waiting for the host: the sample is no number instead.
        x_t, _, time_B = run(backend, device, batch((5, 9)), row_B)
        others = torch.tensor([0, 1, 3, 4], device=device)
        assert x_t[2].isnan().all() and time_B[2].isnan()
        assert torch.isfinite(x_t[others]).all() and torch.isfinite(time_B[others]).all()
    else:
        error, message = ValueError, rf"row_B\[2\] = {wrong} is no row of a table of 20 rows"
        if backend == "reference":
            error, message = IndexError, "out of range"
        with pytest.raises(error, match=message):
            run(backend, device, batch((5, 9)), row_B)


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_the_noise_of_the_op(backend: str, device: str, shape: tuple[int, ...]) -> None:
    """Bit for bit what the op writes for a row that scales x0 by zero and the noise by one."""
    found = plain(backend, device, shape)
    assert found.dtype == torch.float32 and found.is_contiguous() and found.device.type == device
    row_B = torch.full((shape[0],), 3)
    assert torch.equal(found, run(backend, device, torch.zeros(shape), row_B)[0])


@every_backend
def test_normals_are_accurate_relative_to_their_own_size(backend: str, device: str) -> None:
    """Step and slots beyond 32 bits wrap alike everywhere."""
    shape = (2, 1001) if INTERPRETING else (5, 40_001)
    found = plain(backend, device, shape, slot=2**32 - 2, step=2**33 + 3, seed=2**63 - 1)
    slot_B = 2**32 - 2 + torch.arange(shape[0])
    exact = philox.normals(2**63 - 1, 2**33 + 3, slot_B, philox.STREAM_EPS, shape[1])
    error = ((found.cpu().double() - exact) / exact).abs().max().item()
    assert error < 5 * 2.0**-23, f"relative error {error / 2.0**-23:.1f} units in the last place"


@every_backend
def test_normals_of_any_cut_of_the_batch(backend: str, device: str) -> None:
    whole = plain(backend, device, (12, 5, 7), slot=20)
    parts = [plain(backend, device, (n, 5, 7), slot=20 + at) for at, n in ((0, 5), (5, 0), (5, 7))]
    assert torch.equal(whole, torch.cat(parts))


@every_backend
def test_step_seed_and_slot_change_every_normal(backend: str, device: str) -> None:
    found = plain(backend, device, (2, 60))
    for other in ({"step": 12}, {"seed": SEED + 1}, {"seed": SEED | 1 << 62}, {"slot": 6}):
        assert (found == plain(backend, device, (2, 60), **other)).float().mean() < 0.02
    assert (found[0] == found[1]).float().mean() < 0.05


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_of_normals(backend: str, device: str, shape: tuple[int, ...]) -> None:
    args = (torch.tensor([11, 4], device=device), shape, SEED, backend)
    torch.library.opcheck(normals_op, args)


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
@every_backend
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    def both(x0: Tensor, row_B: Tensor) -> tuple[Tensor, ...]:
        return (*run(backend, device, x0, row_B), plain(backend, device, tuple(x0.shape)))

    args = batch((4, 3, 4, 4)).to(device), chosen(4).to(device)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*args), both(*args)))


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_result_does_not_depend_on_the_number_of_threads(
    on_threads: Callable[..., list[Any]],
) -> None:
    x0 = batch((5, 4, 64, 64))
    first, *others = on_threads(
        lambda: (*run("cpp", "cpu", x0, chosen(5)), plain("cpp", "cpu", (5, 20_000)))
    )
    for result in others:
        assert all(map(torch.equal, first, result))


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cpp_cpu, "library_functions", functools.partial(cpp_cpu.library_functions, isa)
    )
    test_normals_are_accurate_relative_to_their_own_size("cpp", "cpu")
    for shape in SHAPES:
        test_normals_are_the_noise_of_the_op("cpp", "cpu", shape)
        test_drawn_rows_that_are_given_again_change_no_bit("cpp", "cpu", shape, True)


REFUSALS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    (r"row_B is torch.int32 \(2,\); it must be int64 \[2\]", lambda a: a.update(row_B=a["row_B"].int())),
    (r"row_B is torch.int64 \(3,\)", lambda a: a.update(row_B=torch.zeros(3).long())),
    ("row_B is on meta", lambda a: a.update(row_B=a["row_B"].to("meta"))),
    ("rows_T8 is", lambda a: a.update(rows_T8=a["rows_T8"][:, :7])),
    (r"time_T is torch.float32 \(19,\)", lambda a: a.update(time_T=a["time_T"][1:])),
    ("address_2 is torch.int32", lambda a: a.update(address_2=a["address_2"].int())),
    ("seed=-1", lambda a: a.update(seed=-1)),
    ("dtype=torch.float64", lambda a: a.update(dtype=torch.float64)),
]  # fmt: skip


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
@pytest.mark.parametrize(("message", "change"), REFUSALS)
def test_wrong_arguments_are_refused(message: str, change: Callable[[dict[str, Any]], Any]) -> None:
    rows_T8, time_T = table()
    arguments: dict[str, Any] = {
        "x0": torch.zeros(2, 3), "row_B": torch.tensor([1, 2]), "rows_T8": rows_T8, "time_T": time_T,
        "address_2": torch.tensor([0, 0]), "seed": 1, "dtype": None,
    }  # fmt: skip
    change(arguments)
    with pytest.raises(ValueError, match=message):
        noise_at(**arguments, backend="cpp")


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
def test_rows_are_drawn_or_given() -> None:
    args = (*table(), torch.tensor([0, 0]), 1, 4, False, torch.float32, "cpp")
    with pytest.raises(ValueError, match="neither drawn nor given; pass cdf_T or row_B"):
        noise_op(torch.zeros(2, 3), None, *args)


@pytest.mark.skipif(INTERPRETING, reason="what is checked does not depend on the kernel")
@pytest.mark.parametrize(
    ("message", "address_2", "shape", "seed"),
    [
        (r"shape=\(\) is no batch", [0, 0], (), 1),
        (r"shape=\(2, -1\) is no batch", [0, 0], (2, -1), 1),
        ("address_2 is torch.int64", [0, 0, 0], (2, 2), 1),
        ("address_2 is torch.float32", [0.0, 0.0], (2, 2), 1),
        ("seed=-1 is outside", [0, 0], (2, 2), -1),
    ],
)
def test_wrong_arguments_of_normals_are_refused(
    message: str, address_2: list[Any], shape: tuple[int, ...], seed: int
) -> None:
    with pytest.raises(ValueError, match=message):
        normals(torch.tensor(address_2), shape, seed=seed, backend="cpp")


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter")
@pytest.mark.parametrize("rows", ["given", "none"])
def test_addresses_of_64_bits_and_tiles_in_turn(rows: str) -> None:
    """WIDE changes how offsets are computed, not what they are; nor does a program that takes two tiles."""
    from speed_kernels.noise import triton_gpu

    x0, row_B, address_2 = batch((2, 1500)), torch.tensor([5, 17]), torch.tensor([11, 4])
    rows_T8, time_T = table()
    x_t, used_B, time_B = torch.empty_like(x0), torch.empty(2, dtype=torch.int64), torch.empty(2)
    kernel: Any = triton_gpu.noise_kernel[(2,)]
    kernel(
        x0, x_t, row_B, row_B, rows_T8, time_T, address_2, used_B, time_B, 1500, 20, SEED % 2**32, SEED >> 32,
        1, 1, 1, 2,
        ROWS=rows, STRATIFIED=False, FANOUT=1, TILE=1024, RUN=4, WIDE=True,
    )  # fmt: skip
    if rows == "given":
        expected = run("triton", "cpu", x0, row_B)
        assert all(map(torch.equal, (x_t, used_B, time_B), expected))
    else:
        assert torch.equal(x_t, plain("triton", "cpu", (2, 1500)))
        assert time_B.isnan().all()  # nobody wrote there
