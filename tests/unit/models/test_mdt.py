"""MDT: which tokens are left out, what the masked pass sees and costs, fused and plain kernels, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speed_engine.conditions import label
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.kinds import ConfigError, config_of
from speed_engine.models import mdt

SMALL: dict[str, Any] = {"size": "tiny/2", "hidden_size": 16, "depth": 4, "num_heads": 2}


def network(backends: dict[str, str] | None = None, **changes: Any) -> mdt.MDT:
    """A small one all of whose weights are random."""
    facts = Facts((1, 8, 8), Space.pixels(1), {"label": label.described(3, null=True)})
    config = mdt.Config.model_validate({**SMALL, **changes})
    model = mdt.build(config, facts, 2, dtype=torch.float32, backends=backends)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def inputs(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    return x, torch.arange(batch) * 100.0, torch.arange(batch) % 4


def mask_at(step: int = 3, slot: int = 0, seed: int = 5) -> Tensor:
    return torch.tensor([seed, step, slot])


def test_published_sizes() -> None:
    """DiT-S/2 with the additions counted by hand: places twice, a block, distances in 13 blocks, one token."""
    facts = Facts((4, 32, 32), Space("latents", (1.0,) * 4, (0.0,) * 4), {})
    model = mdt.build(mdt.Config(), facts, 8, device="meta")
    width, block = 384, 12 * 384**2 + 9 * 384 + 6 * 384**2 + 6 * 384
    dits = 12 * block + (256 + 384 + 2) * 384 + (16 + 1) * 384
    dits += 2 * width * width + 2 * width + 32 * width + 32
    more = 2 * 256 * 384 + block + 13 * 6 * 31**2 + 384
    assert sum(p.numel() for p in model.parameters()) == dits + more


def test_which_tokens_stay_is_addressed() -> None:
    model = network()
    kept = model.kept(mask_at(), 400)
    assert kept.shape == (400, 11) and (kept.diff(dim=1) > 0).all() and int(kept.max()) == 15
    assert torch.equal(model.kept(mask_at(slot=100), 300), kept[100:])
    for other in (mask_at(step=4), mask_at(seed=6)):
        assert not torch.equal(model.kept(other, 400), kept)
    share = torch.zeros(16).index_add_(0, kept.flatten(), torch.ones(4400)) / 400
    assert ((share - 11 / 16).abs() < 4 * (11 / 16 * 5 / 16 / 400) ** 0.5).all()


@torch.no_grad()
def test_the_masked_pass_does_not_see_what_is_left_out() -> None:
    model = network()
    x, time, number = inputs()
    out = model(x, time, label=number, mask_at=mask_at())
    kept = torch.zeros(6, 16).scatter(1, model.kept(mask_at(), 6), 1.0).bool().view(6, 1, 4, 4)
    kept = kept.repeat_interleave(2, 2).repeat_interleave(2, 3)
    other = torch.where(kept, x, -x)
    assert torch.equal(model(other, time, label=number, mask_at=mask_at()), out)
    assert not torch.allclose(model(other, time, label=number), model(x, time, label=number))
    third = torch.where(kept, -x, x)
    assert not torch.allclose(model(third, time, label=number, mask_at=mask_at()), out)
    part = model(x[2:], time[2:], label=number[2:], mask_at=mask_at(slot=2))
    torch.testing.assert_close(part, out[2:])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_kernels_compute_what_plain_torch_computes(backend: str, recompute: str) -> None:
    found = []
    for backends in (None, dict.fromkeys(mdt.KERNELS, backend)):
        model = network(backends, recompute="none" if backends is None else recompute)
        x, time, number = inputs()
        total = torch.zeros(())
        for share, further in model.passes(5, mask_at()[1:]):
            out = model(x, time, label=number, **further)
            total = total + share * (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        total.backward()
        found.append([total.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_cost_is_what_torch_counts_and_the_masked_pass_costs_less() -> None:
    model = network(depth=6, mask_ratio=0.5)
    x, time, number = inputs(1)
    counted = []
    for further in ({}, {"mask_at": mask_at()}):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(x, time, label=number, **further)
        counted.append(counter.get_total_flops())
    assert counted[0] == 2 * mdt.macs_per_sample(model.config, model.facts, 2)
    assert sum(counted) == 2 * mdt.training_macs_per_sample(model.config, model.facts, 2)
    assert counted[1] < 0.85 * counted[0]  # of six blocks four see half, and one is added


def test_sixteen_pictures_are_learned_by_heart() -> None:
    """Through both passes, with another mask at every step: the masked one has to know what it does not see."""
    model = network(hidden_size=32, depth=3)
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(16, 2, 8, 8, generator=generator)
    x, time, number = x0[:, :1] + x0[:, 1:], torch.arange(16) * 50.0, torch.arange(16) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    losses = []
    for step in range(90):
        passes = model.passes(0, torch.tensor([step, 0]))
        each = [
            (model(x, time, label=number, **further) - x0).square().mean() for _, further in passes
        ]
        optimizer.zero_grad()
        torch.stack(each).sum().backward()
        optimizer.step()
        losses.append([float(loss.detach()) for loss in each])
    assert losses[-1][0] < 0.35 and losses[-1][1] < 0.6, losses[-1]  # of pictures of variance one
    assert min(losses[0]) > 0.9


def test_a_decoder_is_a_part_of_the_network() -> None:
    with pytest.raises((ConfigError, ValueError), match="decoder_depth 4 must be below the 4"):
        config_of("model", {"kind": "mdt", **SMALL, "decoder_depth": 4})
