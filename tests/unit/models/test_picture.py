"""A picture told beside x: what reaches the network, what it costs, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Conv2d
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speed_engine import kinds
from speed_engine.conditions import image
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.models.parts import picture
from speed_engine.models.parts.unet_blocks import DoublingConv, double

SMALL: dict[str, dict[str, Any]] = {
    "dit": {"size": "tiny/2", "hidden_size": 16, "depth": 1, "num_heads": 2},
    "unet": {"size": "tiny", "width": 8, "num_blocks": 1, "num_heads": 2},
}


def facts(shape: tuple[int, int, int] = (3, 4, 4), size: tuple[int, int] = (8, 8)) -> Facts:
    told = image.described(shape, Space.pixels(shape[0]))
    return Facts((2, *size), Space.pixels(2), {"image": told})


def network(kind: str, backends: dict[str, str] | None = None) -> Any:
    config = kinds.config_of("model", {"kind": kind, **SMALL[kind]})
    model: nn.Module = kinds.home(config).build(
        config, facts(), 2, dtype=torch.float32, backends=backends
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, low = (torch.randn(batch, *shape, generator=generator) for shape in ((2, 8, 8), (3, 4, 4)))
    return x, torch.full((batch,), 5.0), {"image": low, "image_noise": torch.zeros(batch)}


def test_the_pictures_pixels_are_repeated_over_xs_grid() -> None:
    embedder = picture.Embedder(4, 2, 0)
    x, _, told = inputs()
    joined, level = embedder(x, (told["image"], told["image_noise"]))
    assert joined.shape == (3, 5, 8, 8) and level.shape == (3, 4)
    assert torch.equal(joined[:, :2], x)
    for row in range(8):
        for column in range(8):
            there = joined[:, 2:, row, column]
            assert torch.equal(there, told["image"][:, :, row // 2, column // 2])


@pytest.mark.parametrize("kind", SMALL)
def test_picture_and_level_count(kind: str) -> None:
    model = network(kind)
    x, time, told = inputs()
    out = model(x, time, **told)
    for name in told:
        assert not torch.allclose(out, model(x, time, **{**told, name: told[name] + 0.5}))
    with pytest.raises(ValueError, match="image_noise, the level of noise"):
        model(x, time, image=told["image"])
    with pytest.raises(ValueError, match="needs the condition 'image'"):
        model(x, time, image_noise=told["image_noise"])


@pytest.mark.parametrize("kind", SMALL)
def test_macs_are_those_that_torch_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes them; a CPU spares 5 products of 9 where an image is doubled."""
    monkeypatch.setattr(DoublingConv, "forward", lambda conv, x: Conv2d.forward(conv, double(x)))
    model = network(kind)
    x, time, told = inputs(1)
    # torch's counter knows the plain attention only.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, time, **told)
    counted = kinds.home(model.config).macs_per_sample(model.config, model.facts, 2)
    assert counter.get_total_flops() == 2 * counted


def test_fused_is_plain() -> None:
    x, time, told = inputs()
    ops = kinds.find("model", "dit").KERNELS
    each = [network("dit", dict.fromkeys(ops, word)) for word in ("reference", "cpp")]
    outs = [model(x, time, **told) for model in (network("dit"), *each)]
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(outs[2], outs[0])


@pytest.mark.parametrize("shape", [(3, 3, 3), (3, 16, 16), (3, 4, 8)])
def test_pictures_that_do_not_fit_the_grid(shape: tuple[int, int, int]) -> None:
    for kind in SMALL:
        config = kinds.config_of("model", {"kind": kind, **SMALL[kind]})
        with pytest.raises(ValueError, match=r"conditions\.image: pictures of .* 8x8 by a whole"):
            kinds.home(config).build(config, facts(shape), 2)
    assert picture.input_channels(facts((1, 4, 4), (8, 8))) == 3
    assert picture.input_channels(facts((1, 4, 8), (8, 16))) == 3
