"""A DiT told captions: what reaches it, fused and plain kernels, its cost, its size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speed_engine.conditions import text
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models import dit, dit_text
from speed_engine.models.parts.fp8 import Fp8Linear

SMALL: dict[str, Any] = {"size": "tiny/2", "hidden_size": 16, "depth": 2, "num_heads": 2}
LENGTH, WIDTH = 5, 12


def facts(
    shape: tuple[int, ...] = (1, 8, 8), length: int = LENGTH, width: int = WIDTH, **settings: Any
) -> Facts:
    empty = {"text": np.zeros(width, "f2"), "text_tokens": np.zeros((length, width), "f2")}
    told = text.build(text.Config(**settings), "text", text.described("clip", 2, empty, 9)).facts
    return Facts(shape, Space.pixels(shape[0]), {"text": told})


def network(backends: dict[str, str] | None = None, **changes: Any) -> dit_text.DiTText:
    """A small one all of whose weights are random."""
    config = dit_text.Config.model_validate({**SMALL, "cross_attention": True, **changes})
    model = dit_text.build(config, facts(), 2, dtype=torch.float32, backends=backends)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 1, 8, 8, generator=draw)
    told = {"text": torch.randn(batch, WIDTH, generator=draw).half()}
    told["text_tokens"] = torch.randn(batch, LENGTH, WIDTH, generator=draw).half()
    return x, torch.arange(batch) * 100.0, told


@torch.no_grad()
def test_tokens_and_pooled_vector_both_reach_the_picture_and_untrained_blocks_are_the_identity() -> (
    None
):
    x, time, told = inputs()
    for crossing in (True, False):
        model = network(cross_attention=crossing)
        out = model(x, time, **told)
        for name, heard in (("text", True), ("text_tokens", crossing)):
            other = model(x, time, **{**told, name: told[name].flip(0)})
            assert torch.equal(other[1], out[1])  # the one in the middle kept its caption
            assert torch.allclose(other[0], out[0]) != heard
    fresh = dit_text.build(model.config, facts(), 2, dtype=torch.float32)
    assert not fresh(x, time, **told).any()
    with pytest.raises(ValueError, match="needs the condition 'text'"):
        model(x, time)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_kernels_compute_what_plain_torch_computes(backend: str, recompute: str) -> None:
    found = []
    for backends in (None, dict.fromkeys(dit_text.KERNELS, backend)):
        model = network(backends, recompute="none" if backends is None else recompute)
        x, time, told = inputs()
        out = model(x, time, **told)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("crossing", [False, True])
def test_cost_is_what_torch_counts(crossing: bool) -> None:
    model = network(cross_attention=crossing)
    x, time, told = inputs(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, time, **told)
    macs = dit_text.macs_per_sample(model.config, model.facts, 2)
    assert counter.get_total_flops() == 2 * macs


def test_sizes() -> None:
    """XL/2 with CLIP ViT-B/32: the MLP of the pooled vector; a branch of four products and its adaLN in each block."""
    data, width, hidden = facts((4, 32, 32), 77, 512), 512, 1152
    plain = dit.build(dit.Config(), Facts(data.shape, data.space), 8, device="meta")
    sizes = [sum(p.numel() for p in plain.parameters())]
    for crossing in (False, True):
        config = dit_text.Config(cross_attention=crossing)
        model = dit_text.build(config, data, 8, device="meta")
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[1] - sizes[0] == (width + 1) * hidden + (hidden + 1) * hidden
    branch = 2 * (hidden + 1) * hidden + (width + 1) * 2 * hidden + (hidden + 1) * 3 * hidden
    assert sizes[2] - sizes[1] == 28 * branch


@pytest.mark.parametrize("products", ["fp8_tensor", "fp8_row"])
def test_products_in_fp8(products: str) -> None:
    """Six of a block: all but the caption's, of which there are 5 rows a sample."""
    (x, time, told), model = inputs(), network(products=products)
    swapped = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    parts = ("attn.qkv", "attn.proj", "cross.q", "cross.proj", "mlp.fc1", "mlp.fc2")
    assert swapped == {f"blocks.{block}.{part}" for block in range(2) for part in parts}
    out, wanted = model(x, time, **told), network()(x, time, **told)
    assert 1e-4 < (out - wanted).norm() / wanted.norm() < 0.2
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_does_not_fit_is_refused() -> None:
    config = dit_text.Config.model_validate({**SMALL, "cross_attention": True})
    with pytest.raises(ValueError, match=r"cross_attention=true needs the tokens"):
        dit_text.build(config, facts(tokens=False), 2, device="meta")


@torch.no_grad()
def test_tokens_go_around_the_blocks_of_a_route_here_too() -> None:
    model, (x, time, told) = network(route=(0, 1)), inputs()
    whole = network()(x, time, **told)
    assert torch.equal(model(x, time, **told), whole)
    ((_, around),) = model.passes(5, torch.tensor([3, 0]))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        routed = model(x, time, **told, **around)
    assert not torch.allclose(routed, whole, atol=1e-3)
    macs = dit_text.training_macs_per_sample(model.config, model.facts, 2)
    assert counter.get_total_flops() == 3 * 2 * macs
    assert macs < dit_text.macs_per_sample(model.config, model.facts, 2)
