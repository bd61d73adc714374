"""`model.route`: which tokens go around some blocks of a DiT in training, and what that costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.kinds import config_of
from speed_engine.models import dit, mdt

SMALL: dict[str, Any] = {"size": "tiny/2", "hidden_size": 16, "depth": 4, "num_heads": 2}
ADDRESS = torch.tensor([3, 0])


def network(backends: dict[str, str] | None = None, **changes: Any) -> dit.DiT:
    """A small one all of whose weights are random, whatever its route."""
    facts = Facts((1, 8, 8), Space.pixels(1))
    config = dit.Config.model_validate({**SMALL, "route": (1, 3), **changes})
    model = dit.build(config, facts, 2, dtype=torch.float32, backends=backends)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def inputs(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.arange(batch) * 100.0


def further(model: dit.DiT, step: int = 3, slot: int = 0, seed: int = 5) -> dict[str, Tensor]:
    ((share, keywords),) = model.passes(seed, torch.tensor([step, slot]))
    assert share == 1
    return keywords


@torch.no_grad()
def test_sampling_sees_all_and_training_goes_around_by_address() -> None:
    model, plain = network(), network(route=None)
    x, time = inputs()
    assert torch.equal(model(x, time), plain(x, time)) and not further(plain)
    routed = model(x, time, **further(model))
    assert not torch.allclose(routed, model(x, time), atol=1e-3)
    assert torch.equal(model(x, time, **further(model)), routed)
    torch.testing.assert_close(model(x[2:], time[2:], **further(model, slot=2)), routed[2:])
    for other in (further(model, step=4), further(model, seed=6)):
        assert not torch.allclose(model(x, time, **other), routed, atol=1e-3)


@torch.no_grad()
def test_what_goes_around_all_blocks_comes_out_as_it_went_in() -> None:
    """With a route around everything a token that is left out meets the final layer with its embedding alone."""
    model = network(route=(0, 4))
    x, time = inputs()
    moved = model(x, time, **further(model)) - model(-x, time, **further(model))
    for block in model.blocks:
        for parameter in block.parameters():
            parameter.zero_()
    still = model(x, time) - model(-x, time)
    same = torch.isclose(moved, still, atol=1e-5).all(1).view(6, 4, 2, 4, 2).all(4).all(2)
    assert same.sum((1, 2)).tolist() == [8] * 6  # of 16 tokens half go around


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_kernels_compute_what_plain_torch_computes(recompute: str) -> None:
    found = []
    for backends in (None, dict.fromkeys(dit.KERNELS, "reference")):
        model = network(backends, recompute="none" if backends is None else recompute)
        x, time = inputs()
        out = model(x, time, **further(model))
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_cost_is_what_torch_counts() -> None:
    model = network(route_ratio=0.6)
    x, time = inputs(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, time, **further(model))
    counted = counter.get_total_flops()
    assert counted == 2 * dit.training_macs_per_sample(model.config, model.facts, 2)
    assert counted < 0.8 * 2 * dit.macs_per_sample(model.config, model.facts, 2)


@pytest.mark.parametrize("route", [[2, 2], [3, 1], [0, 5], [-1, 2]])
def test_a_route_that_there_is_not(route: list[int]) -> None:
    with pytest.raises(ValueError, match=r"model\.route .* from 0 to 4"):
        config_of("model", {"kind": "dit", **SMALL, "route": route})


def test_an_mdt_has_none() -> None:
    with pytest.raises(ValueError, match="route"):
        config_of("model", {"kind": "mdt", **SMALL, "route": [1, 2]})
    assert mdt.Config.model_validate(SMALL).route is None
