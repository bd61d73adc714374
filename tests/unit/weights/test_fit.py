"""Weights against a network: what does not fit is named, and then nothing is copied."""

from __future__ import annotations

import pytest
import torch

from speed_engine.weights import fit


def test_keys_that_do_not_fit_are_named(network):
    model = network()
    good = model.state_dict()
    key = "blocks.0.mlp.fc1.bias"
    without = {k: v for k, v in good.items() if k != key}
    for weights, message in (
        (without, f"x does not fit the model .missing: {key}"),
        ({**good, "extra.weight": torch.zeros(1)}, "unknown: extra.weight"),
        ({**good, key: torch.zeros(5)}, r"fc1.bias is \[5\] instead of \[64\]"),
        ({**good, key: torch.zeros(64, dtype=torch.int64)}, f"not floating-point: {key}"),
        ({}, "missing: pos_embed, .* more"),
    ):
        with pytest.raises(ValueError, match=message):
            fit.load_into(model, weights, "x")


def test_nan_is_not_read_and_then_nothing_is(network):
    model = network()
    key = "blocks.1.mlp.fc2.weight"
    broken = model.state_dict()[key].clone()
    broken[0, 3] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"elsewhere has weights .* in {key}"):
        fit.load_into(model, {**network(seed=2).state_dict(), key: broken}, "elsewhere")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # all or nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_are_converted(network, dtype):
    model, other = network(), network(seed=2)
    fit.load_into(model, {k: v.to(dtype) for k, v in other.state_dict().items()}, "x")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    wanted = other.blocks[0].attn.qkv.weight.to(dtype).float()
    assert torch.equal(model.blocks[0].attn.qkv.weight, wanted)


def test_a_network_that_the_weights_cannot_fill_is_not_built():
    built = []

    def build(device):
        layers = []
        while True:  # no end
            layers.append(torch.nn.Linear(1, 1, device=device))
            built.append(device)

    with pytest.raises(ValueError, match="x describes a model of far more parts"):
        fit.filled(build, {"w": torch.zeros(1)}, "x", "cpu")
    assert len(built) < 1000 and set(built) == {"meta"}
    torch.nn.Linear(1, 1)  # nothing is left behind


def test_nothing_is_built_on_the_device_before_the_weights_fit():
    devices = []

    def build(device):
        devices.append(device)
        return torch.nn.Linear(2, 3, device=device)

    with pytest.raises(ValueError, match=r"weight is \[3, 4\] instead of \[3, 2\]"):
        fit.filled(build, {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, "x", "cpu")
    assert devices == ["meta"]
    weights = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    assert torch.equal(fit.filled(build, weights, "x", "cpu").weight, torch.ones(3, 2))
