"""Products in e4m3: against rounding done by hand, at the precision that e4m3 has, and refused where they cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speed_engine.conditions import label
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import dit
from speed_engine.models.parts import fp8

BOTH = pytest.mark.parametrize("scaling", ["tensor", "row"])
ULP = 2.0**-7  # of bf16, the largest
TINY_DIT: dict[str, Any] = {
    "facts": Facts((1, 8, 8), Space.pixels(1), {"label": label.described(10, null=True)}),
    "num_outputs": 1,
}


def by_hand(x_RC: Tensor, scaling: str) -> Tensor:
    """What is left of x in e4m3, in float64: three bits of mantissa, the least normal number 2^-6."""
    x_RC = x_RC.detach().float()
    amax = x_RC.abs().amax(1, keepdim=True) if scaling == "row" else x_RC.abs().amax()
    scale = (amax / 448).clamp(min=torch.finfo(torch.float32).tiny)
    value = (x_RC * (1 / scale)).double()
    exponent = torch.frexp(value)[1].sub(1).clamp(min=-6)  # of the leading bit
    step = torch.ldexp(torch.ones_like(value), exponent - 3)
    return (value / step).round() * step * scale.double()  # round: to even


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal but for the rounding to bf16 and the order of a float32 sum."""
    size = wanted.abs().amax().item() if wanted.numel() else 0.0
    torch.testing.assert_close(got.double(), wanted, rtol=ULP, atol=1e-5 * size)


def error(got: Tensor, exact: Tensor) -> Tensor:
    """Relative error of each row."""
    return (got.double() - exact.double()).norm(dim=1) / exact.double().norm(dim=1)


def operands(
    rows: int = 64, inputs: int = 96, outputs: int = 48, dtype: torch.dtype = torch.bfloat16
):
    """(x, weight, bias, gradient of the output); rows and columns of very different size."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = torch.exp2(torch.arange(rows) % 5.0)[:, None]
    x, weight, bias = normal(rows, inputs) * sizes, normal(outputs, inputs), normal(outputs)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    return *leaves, (normal(rows, outputs) / sizes).to(dtype)


# ------------------------------------------------------------------ numbers


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_product_and_gradients_are_those_of_the_rounded_operands(scaling, dtype):
    x, weight, bias, d_out = operands(dtype=dtype)
    out = fp8.fp8_linear(x, weight, bias, scaling)
    assert out.dtype == dtype
    rounded_bias = bias.detach().bfloat16().double()
    close(out, by_hand(x, scaling) @ by_hand(weight, scaling).T + rounded_bias)
    out.backward(d_out)
    assert all(leaf.grad.dtype == dtype for leaf in (x, weight, bias))
    close(x.grad, by_hand(d_out, scaling) @ by_hand(weight.T, scaling).T)
    close(weight.grad, by_hand(d_out.T, scaling) @ by_hand(x.T, scaling).T)
    torch.testing.assert_close(bias.grad, d_out.float().sum(0).to(dtype), rtol=ULP, atol=1e-5)


@BOTH
def test_error_is_that_of_three_bits(scaling):
    x, weight, _, d_out = operands(rows=128, inputs=256, outputs=128)
    out = fp8.fp8_linear(x, weight, None, scaling)
    out.backward(d_out)
    exact_x, exact_weight, exact_d = (t.detach().double() for t in (x, weight, d_out))
    for got, exact in (
        (out, exact_x @ exact_weight.T),
        (x.grad, exact_d @ exact_weight),
        (weight.grad, exact_d.T @ exact_x),
    ):
        found = error(got.detach(), exact)
        # Exactly e4m3: neither better (bf16 has 0.003) nor a scale gone wrong.
        assert 0.02 < found.mean() < 0.045 and found.max() < 0.07


def test_rows_of_their_own_scale_do_not_drown():
    x, weight, _, _ = operands()
    x = x.detach().float()
    x[0] *= 1e8
    exact = x.double() @ weight.detach().double().T
    assert error(fp8.fp8_linear(x, weight, None, "row").detach(), exact).max() < 0.07
    drowned = fp8.fp8_linear(x, weight, None, "tensor").detach()
    assert (drowned[1:] == 0).all() and error(drowned[:1], exact[:1]) < 0.07


@BOTH
def test_gradients_point_the_way_the_exact_product_changes(scaling):
    """<gradient, v> against the change of the exact product along v, for random directions."""
    x, weight, bias, d_out = operands(rows=128, inputs=128, outputs=96)
    fp8.fp8_linear(x, weight, bias, scaling).backward(d_out)
    generator = torch.Generator().manual_seed(11)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    F.linear(*exact).backward(d_out.double())
    for leaf, wanted in zip((x, weight, bias), exact, strict=True):
        # A random direction with a component along the gradient, so that the sum does not cancel.
        noise = torch.randn(leaf.shape, generator=generator).double()
        direction = wanted.grad + wanted.grad.std() * noise
        slope = (leaf.grad.double() * direction).sum().item()
        assert slope == pytest.approx((wanted.grad * direction).sum().item(), rel=0.01)


@BOTH
def test_zeros_stay_zeros(scaling):
    x, weight, bias, d_out = operands()
    zeros = torch.zeros_like
    assert torch.equal(fp8.fp8_linear(zeros(x), weight, bias, scaling), bias.expand(64, -1))
    assert (fp8.fp8_linear(x, zeros(weight), None, scaling) == 0).all()
    out = fp8.fp8_linear(x, weight, bias, scaling)
    for gradient in torch.autograd.grad(out, (x, weight, bias), zeros(d_out)):
        assert (gradient == 0).all()


@BOTH
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_magnitudes_of_bf16_are_no_trouble(scaling, size):
    """Also gradients of 1e-30: a floor under the scale, as 1e-12, would lose them."""
    x, weight, bias, d_out = operands()
    exact = (x.detach().double() * size) @ weight.detach().double().T
    out = fp8.fp8_linear(x.detach() * size, weight, None, scaling).detach()
    assert out.isfinite().all() and error(out, exact).max() < 0.07
    fp8.fp8_linear(x, weight, bias, scaling).backward(d_out * size)
    exact = (d_out.double() * size).T @ x.detach().double()
    assert weight.grad.isfinite().all() and error(weight.grad, exact).max() < 0.07


@BOTH
def test_the_smallest_numbers_make_no_nan(scaling):
    x, weight, _, _ = operands()
    for size in (1e-38, 1e-40):  # the least normal number is 1.2e-38
        tiny = x.detach().float().sign() * size
        assert fp8.fp8_linear(tiny, weight, None, scaling).isfinite().all()


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_fault_is_not_hidden(scaling, bad):
    x, weight, bias, d_out = operands()
    row = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor(5), True)
    broken = x.detach().clone()
    broken[5, 7] = bad
    found = ~fp8.fp8_linear(broken, weight, bias, scaling).isfinite()
    assert found[5].all() and (scaling == "tensor" or not found[~row].any())
    broken = weight.detach().clone()
    broken[5, 7] = bad
    assert (~fp8.fp8_linear(x, broken, bias, scaling).isfinite())[:, 5].all()
    broken = d_out.clone()
    broken[5, 7] = bad
    out = fp8.fp8_linear(x, weight, bias, scaling)
    d_x, d_weight, d_bias = torch.autograd.grad(out, (x, weight, bias), broken)
    assert not d_x[5].isfinite().any() and not d_weight[7].isfinite().any()
    assert not d_bias[7].isfinite()


# ------------------------------------------------------------------ layouts, shapes, what is kept


@BOTH
def test_strides_and_leading_sizes_do_not_matter(scaling):
    x, weight, bias, d_out = operands()
    wanted = fp8.fp8_linear(x, weight, bias, scaling)
    wanted_grads = torch.autograd.grad(wanted, (x, weight, bias), d_out)

    wide = torch.full((4, 16, 200), 1e9, dtype=x.dtype)
    wide[..., ::2][..., :96] = x.detach().view(4, 16, 96)
    strided_x = wide[..., ::2][..., :96].requires_grad_()
    strided_weight = weight.detach().T.contiguous().T.requires_grad_()
    strided_d = d_out.T.contiguous().T.view(4, 16, 48)
    assert not any(t.is_contiguous() for t in (strided_x, strided_weight, strided_d))
    out = fp8.fp8_linear(strided_x, strided_weight, bias, scaling)
    assert torch.equal(out, wanted.view(4, 16, 48))
    grads = torch.autograd.grad(out, (strided_x, strided_weight, bias), strided_d)
    for grad, one in zip(grads, wanted_grads, strict=True):
        assert torch.equal(grad.reshape(one.shape), one)


@BOTH
def test_a_gradient_without_memory_of_its_own(scaling):
    x, weight, bias, _ = operands()
    fp8.fp8_linear(x, weight, bias, scaling).sum().backward()  # the gradient is one expanded 1
    ones = torch.ones(64, 48)
    close(weight.grad, by_hand(ones.T, scaling) @ by_hand(x.T, scaling).T)
    assert torch.equal(bias.grad, torch.full_like(bias, 64))


@BOTH
def test_twice_the_same_bits(scaling):
    def run():
        x, weight, bias, d_out = operands()
        out = fp8.fp8_linear(x, weight, bias, scaling)
        return out, *torch.autograd.grad(out, (x, weight, bias), d_out)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_only_the_gradients_that_are_wanted():
    x, weight, bias, d_out = operands(rows=9)  # no product sums over the rows
    frozen = weight.detach()
    out = fp8.fp8_linear(x, frozen, bias, "row")
    d_x, d_bias = torch.autograd.grad(out, (x, bias), d_out)
    assert d_x.shape == x.shape and d_bias.shape == bias.shape
    with torch.no_grad():
        assert fp8.fp8_linear(x, weight, bias, "tensor").shape == (9, 48)
        assert fp8.fp8_linear(x[0], weight, bias, "tensor").shape == (48,)


def test_one_scale_keeps_the_input_in_eight_bits():
    kept = {}
    for scaling in ("tensor", "row"):
        x, weight, bias, _ = operands()
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes, weight: Tensor = weight) -> Tensor:
            if tensor.data_ptr() != weight.data_ptr():
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fp8.fp8_linear(x, weight, bias, scaling)
        kept[scaling] = sum(sizes)
    assert kept == {"tensor": 64 * 96 + 4, "row": 64 * 96 * 2 + 64 * 4}


def test_no_second_derivative():
    x, weight, _, _ = operands()
    (d_x,) = torch.autograd.grad(
        fp8.fp8_linear(x, weight, None, "row").square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


@pytest.mark.parametrize(("scaling", "backend"), [("tensor", "aot_eager"), ("row", "inductor")])
def test_compiles_without_a_break(scaling, backend):
    x, weight, bias, d_out = operands()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fp8.fp8_linear(x, weight, bias, scaling) * 2  # exact: a power of two

    wanted = run(x, weight, bias)
    wanted_grads = torch.autograd.grad(wanted, (x, weight, bias), d_out)
    got = torch.compile(run, fullgraph=True, backend=backend)(x, weight, bias)
    grads = torch.autograd.grad(got, (x, weight, bias), d_out)
    for one, other in zip((got, *grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(one, other, rtol=2 * ULP, atol=0.02)


# ------------------------------------------------------------------ the layer, and swapping it in


@BOTH
def test_layer_has_the_state_of_a_linear_layer(scaling):
    torch.manual_seed(0)
    plain = nn.Linear(32, 48)
    layer = fp8.Fp8Linear(32, 48, scaling=scaling)
    layer.load_state_dict(plain.state_dict())
    assert list(layer.state_dict()) == list(plain.state_dict())
    x = torch.randn(16, 32)
    assert error(layer(x).detach(), plain(x).detach()).max() < 0.07
    assert f"scaling={scaling}" in repr(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    without = fp8.Fp8Linear(32, 48, bias=False, scaling=scaling)
    assert without.bias is None and without(x).shape == (16, 48)


def test_autocast_gives_bf16_and_float32_gradients():
    layer = fp8.Fp8Linear(32, 48, scaling="tensor")
    x = torch.randn(16, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fp8.fp8_linear(x.bfloat16(), layer.weight, layer.bias, "tensor"))
    out.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@BOTH
def test_convert_takes_the_four_products_of_each_block_of_a_dit(scaling):
    config = dit.Config(size="tiny/2", hidden_size=32, depth=2, num_heads=2)
    model = dit.build(config, **TINY_DIT)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    inputs = {"x_BCHW": torch.randn(3, 1, 8, 8), "time_B": torch.arange(3) * 300}
    inputs["label"] = torch.arange(3)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    keys, wanted = list(model.state_dict()), model(**inputs).detach()
    assert fp8.convert(model.eval(), scaling) == 8
    swapped = {n for n, m in model.named_modules() if isinstance(m, fp8.Fp8Linear)}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert swapped == {f"blocks.{i}.{part}" for i in range(2) for part in parts}
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert not any(module.training for module in model.modules())
    out = model(**inputs)
    assert 1e-4 < (out - wanted).norm() / wanted.norm() < 0.1
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert fp8.convert(model, scaling) == 0  # nothing is left


def test_convert_leaves_a_bias_to_whoever_adds_it():
    class Product(nn.Linear):
        bias_later = True

    model = nn.Sequential(Product(16, 16), nn.Linear(16, 16), nn.ReLU())
    assert fp8.convert(model, "row", names=lambda name: name == "0") == 1
    assert type(model[0]) is fp8.Fp8Linear and type(model[1]) is nn.Linear
    assert (model[0](torch.zeros(16, 16)) == 0).all() and model[0].bias.abs().sum() > 0


def test_convert_works_where_nothing_is_allocated():
    model = dit.build(dit.Config(size="S/2"), **TINY_DIT, device="meta")
    assert fp8.convert(model, "row") == 48
    assert all(parameter.is_meta for parameter in model.parameters())


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        (((16, 24), (32, 24)), "the layer has 24 inputs"),
        (((16, 32), (40, 32)), "the layer has 40 outputs"),
        (((9, 32), (32, 32)), "x has 9 rows"),
        (((0, 32), (32, 32)), "x has 0 rows"),
        (((16, 48), (32, 32)), "x has 48 columns and the weight 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(shapes, named):
    x, weight = (torch.randn(shape, requires_grad=True) for shape in shapes)
    with pytest.raises(ValueError, match=named):
        fp8.fp8_linear(x, weight, None, "tensor")


def test_other_mistakes_are_refused():
    x, weight, bias, _ = operands()
    with pytest.raises(ValueError, match="scaling 'block' must be 'tensor' or 'row'"):
        fp8.fp8_linear(x, weight, bias, "block")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="x of an fp8 product must be bfloat16 or float32"):
        fp8.fp8_linear(x.half(), weight, bias, "row")
    with pytest.raises(ValueError, match=r"has 24 inputs.*model\.hidden_size"):
        fp8.Fp8Linear(24, 32, scaling="row")
    model = nn.ModuleDict({"good": nn.Linear(16, 16), "odd": nn.Linear(16, 20)})
    with pytest.raises(ValueError, match="odd has 20 outputs"):
        fp8.convert(model, "row", names=lambda name: True)
    assert type(model["good"]) is nn.Linear  # nothing was changed


def test_unavailable_says_why_in_one_sentence(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert fp8.fp8_unavailable(cpu) is None
    why = fp8.fp8_unavailable(torch.device("mps"))
    assert why == (
        "fp8 products run on CUDA devices and CPUs, not on mps; choose model.products=native"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none" in (fp8.fp8_unavailable(cuda) or "")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for capability, runs in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        why = fp8.fp8_unavailable(cuda)
        assert (why is None) == runs
        assert runs or f"Some GPU has {capability[0]}.{capability[1]}" in (why or "")
    monkeypatch.delattr(torch, "_scaled_mm")
    assert "no scaled matrix product" in (fp8.fp8_unavailable(cuda) or "")
    assert "no scaled matrix product" in (fp8.fp8_unavailable(cpu) or "")
