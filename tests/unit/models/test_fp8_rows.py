"""A DiT's products by rows in e4m3 take what the norm before them made, and give the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speed_engine.conditions import label
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import dit
from speed_engine.models.parts import fp8

FACTS = Facts((1, 8, 8), Space.pixels(1), {"label": label.described(10, null=True)})
CONFIG = {"size": "tiny/2", "depth": 2, "products": "fp8_row"}


def step(monkeypatch: pytest.MonkeyPatch, made_before: bool, precision: str, **keys: Any):
    """(numbers of a forward and backward pass, how many matrices each product's input was quantised from)."""
    monkeypatch.setattr(fp8.Fp8Linear, "takes_rows", made_before)
    config = dit.Config.model_validate({**CONFIG, **keys})
    model = dit.build(
        config, FACTS, 1, dtype=torch.float32, backends=dict.fromkeys(dit.KERNELS, "cpp")
    )
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):  # no gate is zero
            generator = torch.Generator().manual_seed(seed)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if precision == "bf16":
        model.bfloat16()
    quantised = []

    def counted(x_RC: torch.Tensor, scaling: fp8.Scaling) -> fp8.Scaled:
        quantised.append(tuple(x_RC.shape))
        return quantise(x_RC, scaling)

    quantise = fp8.quantise
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "quantise", counted)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 1, 8, 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            out = model(x, torch.tensor([3.0, 700.0]), label=torch.tensor([1, 10]))
        in_forward = len(quantised)
        out.float().square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), *gradients], in_forward


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_same_bits_and_half_of_the_inputs_are_not_read_again(precision, recompute, monkeypatch):
    """Of four products a block, qkv and fc1 come behind a norm; all four quantise their weight."""
    found, count = step(monkeypatch, True, precision, recompute=recompute)
    wanted, afterwards = step(monkeypatch, False, precision, recompute=recompute)
    assert all(map(torch.equal, found, wanted))
    assert (afterwards, count) == (2 * 8, 2 * 6)


def test_a_scale_a_tensor_asks_for_no_rows():
    model = dit.build(dit.Config.model_validate({**CONFIG, "products": "fp8_tensor"}), FACTS, 1)
    layers = [each for each in model.modules() if isinstance(each, fp8.Fp8Linear)]
    assert len(layers) == 8 and not any(layer.takes_rows for layer in layers)
