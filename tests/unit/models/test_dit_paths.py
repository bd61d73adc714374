"""How a DiT computes: fused or plain, recomputed or kept, projections together or apart. The same numbers."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speed_engine.conditions import label
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import dit
from speed_engine.models.parts import glue


def digits(size: int = 8) -> dict[str, Any]:
    """The arguments of `build` that come from the data."""
    conditions = {"label": label.described(10, null=True)}
    return {"facts": Facts((1, size, size), Space.pixels(1), conditions), "num_outputs": 1}


def small(**changes) -> dit.Config:
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 2}
    return dit.Config(size="tiny/2", **{**sizes, **changes})


def trained(config: dit.Config, size: int = 8, backends: dict[str, str] | None = None) -> dit.DiT:
    """A model whose zeros are gone, as after some training."""
    model = dit.build(config, **digits(size), backends=backends)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def inputs(batch: int = 3, size: int = 8):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, 1, size, size, generator=generator)
    numbers = torch.arange(batch)
    return {"x_BCHW": x, "time_B": numbers * 300, "label": numbers % 10}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    ("precision", "backend"),
    [("fp32", None), ("fp32", "cpp"), ("bf16", "reference"), ("autocast", "cpp")],
)
def test_recomputing_changes_memory_only(recompute, precision, backend):
    backends = backend and dict.fromkeys(dit.KERNELS, backend)
    plain, again = (trained(small(recompute=word), 8, backends) for word in ("none", recompute))
    arguments = inputs()
    for model in (plain, again):
        if precision == "bf16":
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            result = model(**arguments)
        result.square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key
    with torch.no_grad():
        assert torch.equal(plain(**arguments), again(**arguments))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("residual", ["fp32", "compute"])
@pytest.mark.parametrize("fused", [False, True])
def test_activation_estimate_is_what_autograd_saves(precision, recompute, residual, fused):
    """Two batch sizes, so that what does not grow with the batch (autocast's weights) drops out."""
    config = small(hidden_size=96, depth=4, recompute=recompute, residual=residual)
    backends = dict.fromkeys(dit.KERNELS, "reference") if fused else None
    model = trained(config, 16, backends)
    if precision == "bf16":
        model.bfloat16()

    def saved(batch: int) -> int:
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
            return tensor

        arguments = inputs(batch, size=16)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
        ):
            model(**arguments)
        return sum(size for size, _ in kept.values())

    found = (saved(6) - saved(2)) / 4
    options = {"facts": digits(16)["facts"], "precision": precision, "fused": fused}
    estimate = dit.activation_bytes_per_sample(config, **options)
    if recompute == "full":  # the estimate adds the one block that is computed again
        plain = config.model_copy(update={"recompute": "none"})
        one, two = (
            dit.activation_bytes_per_sample(plain.model_copy(update={"depth": depth}), **options)
            for depth in (1, 2)
        )
        estimate -= two - one
    assert found == pytest.approx(estimate, rel=0.15)


def test_xl2_activation_estimate():
    def gigabytes(**changes):
        config = dit.Config(residual="compute", **changes)
        return 256e-9 * dit.activation_bytes_per_sample(config, digits(32)["facts"])

    assert gigabytes() == pytest.approx(76, abs=1)
    assert gigabytes(recompute="selective") == pytest.approx(51, abs=1)
    assert gigabytes(recompute="full") < 20


def test_selective_recompute_repeats_no_product():
    """The products of a step are 3 for each weight matrix, whether or not norms are made again."""

    def products(recompute: str) -> int:
        model = trained(
            small(recompute=recompute), backends=dict.fromkeys(dit.KERNELS, "reference")
        )
        with Operations() as operations:
            model(**inputs()).square().sum().backward()
        return sum(name in ("mm", "addmm") for name in operations.names)

    assert products("selective") == products("none") < products("full")


@pytest.mark.parametrize("residual", ["fp32", "compute"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_fused_is_plain(backend, precision, residual):
    """Output and all gradients of the fused model are those of plain torch, to the rounding of its dtype."""
    config = small(residual=residual, hidden_size=48)
    models = [
        trained(config),
        trained(config, backends=dict.fromkeys(dit.KERNELS, backend)),
    ]
    exact, exact_grads = step(models[0].double(), "fp32")
    found = []
    for model in (trained(config), models[1]):
        if precision == "bf16":
            model.bfloat16()
        found.append(step(model, precision))
    (plain, plain_grads), (fused, fused_grads) = found
    assert plain.dtype == fused.dtype

    def error(value, wanted):
        return ((value.double() - wanted).norm() / (wanted.norm() + 1e-30)).item()

    bound = 2e-6 if precision == "fp32" else 2e-3
    assert error(fused, exact) <= 1.3 * error(plain, exact) + bound
    for name, wanted in exact_grads.items():
        assert (
            error(fused_grads[name], wanted) <= 1.3 * error(plain_grads[name], wanted) + 2 * bound
        ), name


def step(model, precision):
    x, time, labels = inputs().values()
    dtype = next(model.parameters()).dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        out = model(x.to(dtype), time, label=labels)
    out.double().square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_adjacent_projections_are_one_product():
    """In the order that the model asks for, all adaLN projections are one product, with the same numbers."""
    apart, together = trained(small()), trained(small())
    order = together.memory_order()
    assert {id(p) for p in order} == {id(p) for p in together.parameters()}
    flat = torch.cat([p.detach().flatten() for p in order])
    for parameter, part in zip(order, flat.split([p.numel() for p in order]), strict=True):
        parameter.data = part.view_as(parameter)
    counts = []
    for model in (apart, together):
        with Operations() as operations:
            model(**inputs()).square().sum().backward()
        counts.append(sum(name in ("mm", "addmm") for name in operations.names))
    assert counts[0] - counts[1] == 3 * 2, (
        "three projections became one, forward and twice backward"
    )
    for (name, a), b in zip(apart.named_parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_selective_recompute_keeps_neither_norms_nor_gelus(precision, monkeypatch):
    def alive(recompute: str) -> list[bool]:
        """Whether the memory of each norm and GELU is still held after the forward pass."""
        model = trained(small(recompute=recompute), 8, dict.fromkeys(dit.KERNELS, "cpp"))
        held = []

        def watched(make):
            def call(*arguments):
                made = make(*arguments)
                result = made if isinstance(made, torch.Tensor) else made[1].y
                held.append(weakref.ref(result.untyped_storage()))
                return made

            return call

        for name in ("norm", "add_and_norm", "gelu"):
            monkeypatch.setattr(glue.Glue, name, watched(getattr(glue.Glue, name)))
        if precision == "bf16":
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            result = model(**inputs())
        monkeypatch.undo()
        assert result.requires_grad
        return [each() is not None for each in held]

    assert alive("none") == [True] * 7
    assert alive("selective") == [False] * 6 + [True]  # the last is the final layer's
