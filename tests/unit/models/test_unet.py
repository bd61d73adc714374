"""The U-Net: published sizes, cost, fused and plain kernels, addressed dropout, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from speed_kernels.contract import BackendError, Choice
from torch import Tensor
from torch.nn import Conv2d
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speed_engine.conditions import label
from speed_engine.data import ArrayFacts, ConditionFacts, Facts
from speed_engine.data.space import Space
from speed_engine.models import unet
from speed_engine.models.parts.unet_blocks import DoublingConv, double

SMALL: dict[str, Any] = {"size": "tiny", "width": 16, "num_blocks": 1, "num_heads": 2}
ADM = {"resample": "block", "modulation": "scale_shift", "attention_at": (8, 4)}
EDM = {"resample": "block_conv", "up_attention": "last", "residual_scale": 0.5**0.5}
FORMS = [{}, ADM, EDM, {"resample": "pool"}]
IDS = ["paper", "adm", "edm", "pool"]
every_form = pytest.mark.parametrize("form", FORMS, ids=IDS)
CPP = dict.fromkeys(unet.KERNELS, "cpp")


def facts(
    shape: tuple[int, ...] = (1, 8, 8), num_classes: int = 0, null: bool = False, vector: int = 0
) -> Facts:
    told = {}
    if num_classes:
        told["label"] = label.described(num_classes, null=null)
    if vector:
        arrays = {"vector": ArrayFacts((vector,), "float32")}
        told["vector"] = ConditionFacts("vector", arrays)
    return Facts(shape, Space.pixels(shape[0]), told)


def network(
    told: Facts | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> unet.UNet:
    """A small one all of whose weights are random. `backends` among the changes goes to `build`."""
    backends = changes.pop("backends", None)
    config = unet.Config.model_validate({**SMALL, **changes})
    model = unet.build(config, told or facts(), 2, dtype=dtype, backends=backends)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.to(dtype)


def inputs(batch: int = 4, shape: tuple[int, ...] = (1, 8, 8)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, *shape, generator=generator), torch.arange(batch) * 300.0


def drop_at(step: int = 3, slot: int = 0, seed: int = 5) -> Tensor:
    return torch.tensor([seed, step, slot])


# The paper's Table 7 (counted layer by layer), EDM's and ADM's own numbers.
@pytest.mark.parametrize(
    ("size", "shape", "outputs", "classes", "parameters", "millions"),
    [
        ("speed", (4, 32, 32), 8, 0, 35_876_104, 35.88),
        ("speed", (4, 32, 32), 8, 1000, 36_388_104, 36.39),
        ("ddpmpp", (3, 32, 32), 3, 0, 55_732_739, 55.7),
        ("adm64", (3, 64, 64), 6, 1000, 295_904_454, 295.9),
    ],
)
def test_published_sizes(
    size: str,
    shape: tuple[int, ...],
    outputs: int,
    classes: int,
    parameters: int,
    millions: float,
) -> None:
    told = facts(shape, classes)
    model = unet.build(unet.Config(size=size), told, outputs, device="meta")
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == parameters
    assert found / 1e6 == pytest.approx(millions, abs=0.05)


@every_form
def test_cost_is_what_torch_counts(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes it; a CPU spares 5 products of 9 where an image is doubled."""
    monkeypatch.setattr(DoublingConv, "forward", lambda conv, x: Conv2d.forward(conv, double(x)))
    told = facts((1, 8, 16), num_classes=3, vector=5)
    model = network(told, **form)
    x, time = inputs(1, (1, 8, 16))
    conditions = {"label": torch.tensor([1]), "vector": torch.ones(1, 5)}
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        model(x, time, **conditions)
    assert counter.get_total_flops() == 2 * unet.macs_per_sample(model.config, told, 2)


def outcome(model: unet.UNet, at: Tensor | None) -> list[Tensor]:
    """Output and all gradients, in float64."""
    x, time = inputs()
    x = x.to(next(model.parameters()).dtype).requires_grad_()
    out = model(x, time, drop_at=at)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    leaves = [x, *model.parameters()]
    found = torch.autograd.grad((out * weight).float().mean(), leaves)
    return [each.detach().double() for each in (out, *found)]


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernels_compute_what_plain_torch_computes(
    form: dict[str, Any], dtype: torch.dtype
) -> None:
    """Output and every gradient of the reference and the C++ kernels, with dropout, against plain torch in float64."""
    exact = outcome(network(dtype=torch.float64, dropout=0.2, **form), drop_at())
    tolerance = 2e-4 if dtype == torch.float32 else 0.1
    for backends in (None, dict.fromkeys(unet.KERNELS, "reference"), CPP):
        model = network(dtype=dtype, dropout=0.2, backends=backends, **form)
        names = ["output", "x", *(name for name, _ in model.named_parameters())]
        for name, got, wanted in zip(names, outcome(model, drop_at()), exact, strict=True):
            # A key's bias moves all scores of a query alike: its gradient is nothing but rounding.
            error = (got - wanted).norm() / (wanted.norm() + 1e-2 * exact[0].norm())
            assert error < tolerance, (backends, name, error.item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_a_doubling_convolution_is_one_of_the_doubled_image(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv, x = DoublingConv(5, 3, 3, padding=1).double(), torch.randn(2, 5, 4, 6).double()
    weight = torch.randn(2, 3, 8, 12).double()

    def results(there: Tensor, conv: Conv2d, whole: bool) -> list[Tensor]:
        given = there.requires_grad_()
        large = torch.nn.functional.conv2d(double(given), conv.weight, conv.bias, padding=1)
        out = large if whole else conv(given)
        grads = torch.autograd.grad((out * weight.to(out.dtype)).sum(), [given, *conv.parameters()])
        return [out.double(), *(each.double() for each in grads)]

    exact = results(x, conv, whole=True)
    found = results(x.detach().to(dtype), conv.to(dtype), whole=False)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for got, wanted in zip(found, exact, strict=True):
        assert (got - wanted).norm() < tolerance * wanted.norm()


def test_recomputing_changes_no_number() -> None:
    settings: dict[str, Any] = {"dropout": 0.2, "backends": CPP}
    once, twice = network(**settings), network(recompute="full", **settings)
    pairs = zip(outcome(once, drop_at()), outcome(twice, drop_at()), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_memory_is_channels_last_throughout() -> None:
    model = network(backends=CPP)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    seen: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, given, out: seen.append(
                out.is_contiguous(memory_format=torch.channels_last)
                and given[0].is_contiguous(memory_format=torch.channels_last)
            )
        )
    model(*inputs())
    assert len(seen) == len(model.stages) and all(seen)


# ------------------------------------------------------------------ dropout


def test_dropout_is_addressed() -> None:
    """A sample's dropout is a function of seed, step and global slot; without an address nothing is dropped."""
    model = network(dropout=0.3, backends=CPP)
    x, time = inputs(8)
    whole = model(x, time, drop_at=drop_at())
    halves = [
        model(x[first : first + 4], time[first : first + 4], drop_at=drop_at(slot=first))
        for first in (0, 4)
    ]
    torch.testing.assert_close(torch.cat(halves), whole)
    moved = model(x[4:], time[4:], drop_at=drop_at(slot=0))
    for other in (model(x, time), model(x, time, drop_at=drop_at(step=4)), moved):
        assert (other[-4:] - whole[-4:]).abs().max() > 0.01
    assert torch.equal(model(x, time), network(dropout=0.0, backends=CPP)(x, time))


def test_one_pass_carries_the_address() -> None:
    model = network(dropout=0.3)
    ((share, further),) = model.passes(2**62, torch.tensor([7, 40]))
    assert share == 1.0 and further["drop_at"].tolist() == [2**62, 7, 40]
    assert network(dropout=0.0).passes(1, torch.tensor([7, 40])) == [(1.0, {})]
    # Two blocks never share their words.
    numbers = [each.number for each in model.blocks if hasattr(each, "number")]
    assert len(set(numbers)) == len(numbers)


def test_it_can_learn_sixteen_pictures_by_heart() -> None:
    torch.manual_seed(0)
    told = facts()
    model = unet.build(unet.Config.model_validate(SMALL), told, 1, dtype=torch.float32)
    x, target = torch.randn(2, 16, 1, 8, 8)
    time = torch.arange(16) * 60.0
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model(x, time) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(target.square().mean().item())  # it begins at zero
    assert losses[-1] < 0.02


# ------------------------------------------------------------------ attention


def test_another_implementation_of_attention() -> None:
    model = network()
    before = model(*inputs())
    assert model.attention_choice.backend == "sdpa"
    model.attend_by("sdpa_flash")
    assert model.attention_choice.backend == "sdpa_flash"
    torch.testing.assert_close(model(*inputs()), before)
    with pytest.raises(BackendError):
        model.attend_by("xformers")


def test_where_the_fastest_attention_cannot_run_the_reason_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choose(device: Any, word: str, *, num_tokens: int, **_: Any) -> Choice:
        if num_tokens == 16:
            raise BackendError("no kernel for 16 tokens")
        return Choice("attention", "sdpa_flash", "measured", False)

    monkeypatch.setattr(unet, "choose_attention", choose)
    model = network(attention_at=(8,))
    assert model.attention_choice.reason == (
        "measured; sdpa for 16 tokens, as sdpa_flash cannot: no kernel for 16 tokens"
    )
    middle = model.blocks[next(i for i, s in enumerate(model.stages) if s.part == "middle")]
    first: Any = model.blocks[0]
    assert first.attention.attn.attend.__name__ == "attend_flash"
    assert middle.get_submodule("attention.attn").attend.__name__ == "attend"
    with pytest.raises(BackendError):  # asked for by name, it runs everywhere or not at all
        network(attention_at=(8,), attention="sdpa_flash")


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        (
            {"multipliers": (1, 2, 2)},
            (1, 10, 8),
            "has 3 levels, .* multiples of 4, and the data are 10x8; choose fewer levels",
        ),
        ({}, (1, 7, 8), "multiples of 2, and the data are 7x8"),
        ({}, (5,), r"takes images \[C, H, W\], and the data are \(5,\)"),
        ({"width": 44}, (1, 8, 8), "176 channels do not divide into 32 groups"),
    ],
)
def test_data_that_do_not_fit(change: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    config = unet.Config.model_validate({**SMALL, **change})
    told = replace(facts(), shape=shape)
    for attempt in (
        lambda: unet.build(config, told, 2),
        lambda: unet.macs_per_sample(config, told, 2),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            attempt()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "huge"}, "model.size 'huge' is not one of speed, ddpmpp, adm64, tiny"),
        ({"num_heads": 3}, "16 channels do not divide into heads"),
        ({"head_width": 24}, "16 channels do not divide into heads"),
        ({"width": 15}, "model.width must be even"),
        ({"multipliers": (0, 1)}, "model.multipliers at least 1"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet.Config.model_validate({**SMALL, **change})


def test_inputs_that_do_not_fit() -> None:
    model, (x, time) = network(facts(num_classes=3)), inputs()
    with pytest.raises(ValueError, match="needs the condition 'label'"):
        model(x, time)
    with pytest.raises(ValueError, match="does not take the condition 'vector'"):
        model(x, time, label=torch.zeros(4, dtype=torch.int64), vector=torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"takes samples of \(1, 8, 8\), not \(2, 8, 8\)"):
        model(torch.zeros(4, 2, 8, 8), time)
    with pytest.raises(ValueError, match="would merge steps"):
        model(x, time.bfloat16())
