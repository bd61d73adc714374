"""All adaLN projections as one product, or, among several processes, as a few by depth."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from speed_kernels.adamw_ema import flat
from torch import Tensor, nn

from speed_engine.models.parts import modulation


def layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    found = [nn.Linear(8, 12) for _ in range(6)]
    for kind in ("weight", "bias"):
        parameters = [getattr(layer, kind) for layer in found]
        for parameter, part in zip(parameters, flat.side_by_side(parameters), strict=True):
            parameter.data = part
    return found


def test_the_parts_cover_all_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert modulation.parts(7) == [slice(0, 7)]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    for num in (1, 3, 4, 7, 29):
        found = modulation.parts(num)
        assert len(found) == min(modulation.PARTS, num)
        assert [i for part in found for i in range(num)[part]] == list(range(num))


def test_deeper_layers_have_their_gradients_before_the_first_block_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each layer's output serves one link of a chain, as blocks do; the order of gradients is noted."""
    order: list[int | str] = []

    def run(cut: list[slice]) -> list[Tensor]:
        monkeypatch.setattr(modulation, "parts", lambda num: cut)
        found, c_BD = layers(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
        for index, layer in enumerate(found):
            layer.weight.register_post_accumulate_grad_hook(
                lambda _, index=index: order.append(index)
            )
        x = torch.ones(3, 12, requires_grad=True)
        x.register_hook(lambda _: order.append("first block"))
        for output in modulation.project_all(c_BD, found):
            x = torch.tanh(x + output)
        x.sum().backward()
        return [
            x.detach(),
            *(p.grad for layer in found for p in layer.parameters() if p.grad is not None),
        ]

    whole = run([slice(0, 6)])
    assert order[0] == "first block"
    order.clear()
    cut = run([slice(0, 3), slice(3, 6)])
    assert set(order[: order.index("first block")]) == {3, 4, 5}
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other)
