"""Gate, residual sum, norm and modulation against their definitions in float64 with autograd's gradients."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_kernels.gate_residual_norm_modulate import cpp_cpu
from speed_kernels.gate_residual_norm_modulate.op import (
    gate_residual_norm_modulate,
    norm_modulate,
)
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
# The interpreter rounds to bfloat16 towards zero.
ULPS = 1.0 if INTERPRETING else 0.51
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP32, FP16), (BF16, FP32)]
NAMES = ("x", "branch", "gate", "bias", "shift", "scale")

every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


class Problem:
    """Inputs and upstream gradients near what a trained network meets."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        stream: torch.dtype = FP32,
        compute: torch.dtype = FP32,
        has_bias: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(11)
        batch, _, channels = shape

        def draw(*shape: int, dtype: torch.dtype = compute) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        wide = draw(batch, 6 * channels)  # the modulation comes as slices of one product
        gate, shift, scale = (wide[:, i * channels : (i + 1) * channels] for i in (2, 0, 5))
        self.inputs: dict[str, Tensor | None] = {
            "x": draw(*shape, dtype=stream),
            "branch": draw(*shape),
            "gate": gate,
            "bias": draw(channels) if has_bias else None,
            "shift": shift,
            "scale": scale,
        }
        self.d_sum, self.d_y = draw(*shape, dtype=stream), draw(*shape)
        self.use_sum = self.use_y = True

    def run(self, backend: str, device: str, gated: bool = True) -> dict[str, Tensor]:
        """The op's results and the gradients of its inputs."""
        leaves = {
            name: None if value is None else value.to(device).detach().requires_grad_()
            for name, value in self.inputs.items()
        }
        x, branch, gate, bias, shift, scale = (leaves[name] for name in NAMES)
        assert x is not None and shift is not None and scale is not None
        if gated:
            assert branch is not None and gate is not None
            stream, y = gate_residual_norm_modulate(
                x, branch, gate, shift, scale, bias_D=bias, backend=backend
            )
        else:
            stream, y = x, norm_modulate(x, shift, scale, backend=backend)
        used = [(stream, self.d_sum)] if self.use_sum and gated else []
        used += [(y, self.d_y)] if self.use_y else []
        torch.autograd.backward([u for u, _ in used], [d.to(device) for _, d in used])
        found = {"sum": stream.detach(), "y": y.detach()}
        for name, leaf in leaves.items():
            if leaf is not None and leaf.grad is not None:
                assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
                found["d_" + name] = leaf.grad
        return {name: value.cpu() for name, value in found.items()}

    def check(self, found: dict[str, Tensor], gated: bool = True) -> None:
        """Every result within the op's tolerance of float64 of the same rounded sum."""
        leaves = {
            name: None if value is None else value.double().detach().requires_grad_()
            for name, value in self.inputs.items()
        }
        x, branch, gate, bias, shift, scale = (leaves[name] for name in NAMES)
        assert x is not None and shift is not None and scale is not None
        stream, parts = x, x.detach().abs()
        if gated:
            assert branch is not None and gate is not None
            value = branch if bias is None else branch + bias
            stream = x + gate[:, None] * value
            parts = parts + gate.detach()[:, None].abs() * value.detach().abs()
        self.compare("sum", found["sum"], stream, 2.0**-21 * parts)
        stream = stream + (found["sum"].double() - stream).detach()
        mean = stream.mean(2, keepdim=True)
        centred = stream - mean
        rstd = (centred.square().mean(2, keepdim=True) + 1e-6).rsqrt()
        normed = centred * rstd
        y = normed * (1 + scale[:, None]) + shift[:, None]

        d_sum = self.d_sum.double() if self.use_sum and gated else torch.zeros(x.shape).double()
        d_y = self.d_y.double() if self.use_y else torch.zeros(x.shape).double()
        ((stream * d_sum).sum() + (y * d_y).sum()).backward()
        with torch.no_grad():
            row = normed.abs().amax(2, keepdim=True)
            size_y = row * (1 + scale[:, None]).abs() + shift[:, None].abs()
            self.compare("y", found["y"], y, 2.0**-20 * size_y)
            # The saved mean is one float: where it is large, n of the backward pass inherits its rounding.
            row = row + 2.0**-3 * mean.abs() * rstd
            g = (d_y * (1 + scale[:, None])).abs()
            along = (g * row).mean(2, keepdim=True)
            size_x = rstd * (g + g.mean(2, keepdim=True) + row * along) + d_sum.abs()
            sizes = {
                "x": 2.0**-20 * size_x,
                "shift": 2.0**-18 * d_y.abs().sum(1),
                "scale": 2.0**-18 * (d_y.abs() * row).sum(1),
            }
            if gated:
                assert branch is not None and gate is not None
                size_branch = gate[:, None].abs() * size_x
                size_value = branch.abs() if bias is None else branch.abs() + bias.abs()
                sizes["branch"] = 2.0**-20 * size_branch
                sizes["gate"] = 2.0**-18 * (size_value * size_x).sum(1)
                if bias is not None:
                    sizes["bias"] = 2.0**-18 * size_branch.sum((0, 1))
        for name, allowed in sizes.items():
            leaf = leaves[name]
            assert leaf is not None and leaf.grad is not None
            self.compare("d_" + name, found["d_" + name], leaf.grad, allowed)

    @staticmethod
    def compare(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> None:
        limits = torch.finfo(got.dtype)
        allowed = allowed + ULPS * limits.eps * exact.detach().abs() + limits.tiny
        wrong = (got.double() - exact.detach()).abs() > allowed
        assert got.isfinite().all() and not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()}"


# From rows of a few lanes to the widths of DiT-S, B, L and XL; the interpreter takes fewer rows of them.
SHAPES = [(2, 3, 4), (3, 5, 20), (2, 13, 36), (1, 1, 128), (1, 6, 132), (1, 9, 384), (1, 2, 768)]
SHAPES += [(1, 3, 1024), (1, 5, 1152), (1, 2, 1300)]


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_widths(backend: str, device: str, shape: tuple[int, int, int]) -> None:
    problem = Problem(shape)
    problem.check(problem.run(backend, device))


@every_backend
@pytest.mark.parametrize(("stream", "compute"), PAIRS)
def test_dtypes(backend: str, device: str, stream: torch.dtype, compute: torch.dtype) -> None:
    problem = Problem((2, 5, 36), stream, compute)
    found = problem.run(backend, device)
    assert found["sum"].dtype == stream and found["y"].dtype == compute
    problem.check(found)


@every_backend
def test_without_a_bias(backend: str, device: str) -> None:
    problem = Problem((2, 5, 20), FP32, BF16, has_bias=False)
    found = problem.run(backend, device)
    problem.check(found)
    assert "d_bias" not in found


@every_backend
@pytest.mark.parametrize(("stream", "compute"), PAIRS[:3])
def test_norm_and_modulation_alone(
    backend: str, device: str, stream: torch.dtype, compute: torch.dtype
) -> None:
    problem = Problem((2, 5, 36), stream, compute)
    found = problem.run(backend, device, gated=False)
    assert found["y"].dtype == compute
    problem.check(found, gated=False)


@every_backend
@pytest.mark.parametrize("unused", ["use_sum", "use_y"])
def test_one_of_the_two_results_is_not_used(backend: str, device: str, unused: str) -> None:
    problem = Problem((2, 5, 20), FP32, BF16)
    setattr(problem, unused, False)
    problem.check(problem.run(backend, device))


@every_backend
def test_sums_over_many_tokens(backend: str, device: str) -> None:
    """More tokens than a chunk has, with a rest; the same bits each time."""
    problem = Problem((1, 43, 20) if INTERPRETING else (3, 517, 100))
    found = problem.run(backend, device)
    problem.check(found)
    again = problem.run(backend, device)
    assert all(torch.equal(again[name], value) for name, value in found.items())


@every_backend
def test_modulation_is_not_copied_and_other_layouts_are_allowed(backend: str, device: str) -> None:
    problem = Problem((3, 5, 20))
    expected = problem.run(backend, device)
    for name in ("gate", "shift", "scale"):
        value = problem.inputs[name]
        assert value is not None and value.stride() == (120, 1)
        if backend == "cpp":
            assert cpp_cpu.rows_of(value) is value
    layouts = {"x": (1, 0, 2), "branch": (2, 1, 0), "gate": (1, 0), "scale": (1, 0)}
    for name, order in layouts.items():
        value = problem.inputs[name]
        assert value is not None
        problem.inputs[name] = value.permute(order).contiguous().permute(order)
    found = problem.run(backend, device)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@every_backend
def test_expanded_upstream_gradients(backend: str, device: str) -> None:
    problem = Problem((2, 5, 20))
    problem.d_y = torch.tensor([0.5]).expand(2, 5, 20)
    problem.d_sum = torch.randn(2, 1, 20).expand(2, 5, 20)
    problem.check(problem.run(backend, device))


@every_backend
@pytest.mark.parametrize("stream", [FP32, BF16])
@pytest.mark.parametrize("value", [0.0, 1000.123, 1e30, 3e38])
def test_rows_of_equal_numbers_are_normed_to_zero(
    backend: str, device: str, stream: torch.dtype, value: float
) -> None:
    problem = Problem((1, 3, 1152 if value == 1000.123 else 36), stream)
    x = problem.inputs["x"] = torch.full_like(problem.d_sum, value)
    found = problem.run(backend, device, gated=False)
    shift, scale = problem.inputs["shift"], problem.inputs["scale"]
    assert shift is not None and scale is not None
    assert torch.equal(found["y"], shift[:, None].expand(x.shape))
    assert (found["d_scale"] == 0).all()
    # Their variance is zero, not the square of the mean's rounding: what is left under the root is eps.
    g = problem.d_y.double() * (1 + scale.double()[:, None])
    allowed = 2e-6 * 1000.0 * g.abs().max()
    problem.compare("d_x", found["d_x"], 1000.0 * (g - g.mean(2, keepdim=True)), allowed)


@every_backend
@pytest.mark.parametrize(("stream", "compute"), [(FP32, FP32), (BF16, BF16)])
@pytest.mark.parametrize("size", [1e-4, 1e20, 1e30, 1e36])
def test_magnitudes(
    backend: str, device: str, stream: torch.dtype, compute: torch.dtype, size: float
) -> None:
    """From rows that eps dominates to rows whose squares overflow float32."""
    problem = Problem((1, 3, 36), stream, compute)
    x = problem.inputs["x"]
    assert x is not None
    x *= size
    problem.check(problem.run(backend, device, gated=False), gated=False)
    problem.check(problem.run(backend, device))


@every_backend
def test_a_mean_far_from_zero(backend: str, device: str) -> None:
    problem = Problem((2, 3, 384))
    x = problem.inputs["x"]
    assert x is not None
    x += 3000.0
    problem.check(problem.run(backend, device))


@every_backend
@pytest.mark.parametrize("name", ["x", "branch"])
def test_not_a_number_spoils_its_row_alone(backend: str, device: str, name: str) -> None:
    problem = Problem((2, 5, 20))
    spoilt = problem.inputs[name]
    assert spoilt is not None
    spoilt[1, 3, 7] = math.nan
    found = problem.run(backend, device)
    rows = torch.zeros(2, 5, dtype=torch.bool)
    rows[1, 3] = True
    for result in ("y", "d_x", "d_branch"):
        assert torch.equal(found[result].isnan().all(2), rows)
        assert torch.equal(found[result].isnan().any(2), rows)
    assert found["sum"].isnan().sum() == 1
    assert found["d_shift"].isfinite().all() and found["d_scale"][0].isfinite().all()
    assert found["d_scale"][1].isnan().all() and found["d_gate"][1].isnan().all()


@every_backend
def test_empty_batches_and_sequences(backend: str, device: str) -> None:
    for shape in ((0, 4, 12), (2, 0, 12)):
        for gated in (True, False):
            found = Problem(shape, BF16, BF16).run(backend, device, gated)
            assert found["y"].shape == shape
            assert all((value == 0).all() for name, value in found.items() if name[:2] == "d_")
            assert ("d_bias" in found) == gated


@every_backend
def test_a_sample_s_result_does_not_depend_on_its_batch(backend: str, device: str) -> None:
    problem = Problem((3, 5, 20), FP32, BF16)
    whole = problem.run(backend, device)
    for name in ("x", "branch", "gate", "shift", "scale"):
        value = problem.inputs[name]
        assert value is not None
        problem.inputs[name] = value[2:3]
    problem.d_sum, problem.d_y = problem.d_sum[2:3], problem.d_y[2:3]
    alone = problem.run(backend, device)
    for name in ("sum", "y", "d_x", "d_branch"):
        assert torch.equal(alone[name], whole[name][2:3])


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_result_does_not_depend_on_the_number_of_threads(
    on_threads: Callable[..., list[Any]],
) -> None:
    problem = Problem((3, 101, 384), FP32, BF16)
    first, *others = on_threads(lambda: problem.run("cpp", "cpu"))
    for result in others:
        assert all(torch.equal(result[name], value) for name, value in first.items())


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = functools.partial(cpp_cpu.library_functions, isa)
    monkeypatch.setattr(cpp_cpu, "library_functions", functions)
    for stream, compute in PAIRS:
        test_dtypes("cpp", "cpu", stream, compute)
    test_widths("cpp", "cpu", (2, 5, 1152))
    test_magnitudes("cpp", "cpu", FP32, FP32, 1e30)
