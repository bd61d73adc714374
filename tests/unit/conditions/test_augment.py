"""Augmentation as a condition: what is done to a picture, what the network is told of it, and from which numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from speed_engine.conditions import Augmenting, augment
from speed_engine.data import Facts
from speed_engine.data.space import Space

SHAPE = (3, 12, 12)


def condition(**settings: Any) -> augment.Augment:
    config = augment.Config(**settings)
    return augment.build(
        config, "augment", augment.made(config, "augment", Facts(SHAPE, Space.pixels(3)))
    )


def pictures(num: int = 40, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(1))


def test_a_sample_depends_on_its_address_alone() -> None:
    one, x0 = condition(probability=0.5), pictures()
    assert isinstance(one, Augmenting)
    whole, told = one.augment(x0, 1, 2, 0)
    assert told["augment"].shape == (40, 9) and told["augment"].dtype == torch.float32
    parts = [one.augment(part, 1, 2, 10 * i) for i, part in enumerate(x0.split(10))]
    assert torch.equal(torch.cat([x for x, _ in parts]), whole)
    assert torch.equal(torch.cat([each["augment"] for _, each in parts]), told["augment"])
    for seed, step in ((1, 3), (2, 2)):
        assert not torch.equal(one.augment(x0, seed, step, 0)[1]["augment"], told["augment"])


def test_how_often_and_how_far() -> None:
    told_BK, _, moved_B2 = condition().drawn(4_000, 0, 3, 0)
    happened = (told_BK != 0).double().mean(0)
    expected = torch.tensor([0.5, 0.06, *[0.12] * 7], dtype=torch.float64)
    assert ((happened - expected).abs() < 4 * (expected * (1 - expected) / 4_000).sqrt()).all()
    pairs = (told_BK[:, 2] != 0, told_BK[:, 3] != 0)  # each by its own coin
    assert abs((pairs[0] & pairs[1]).double().mean() - 0.12**2) < 0.0075
    normal = torch.cat([told_BK[:, 2], *told_BK[:, 7:].unbind(1)])
    normal = normal[normal != 0].double()
    assert abs(normal.mean()) < 0.12 and abs(normal.std() - 1) < 0.09
    torch.testing.assert_close(moved_B2.float(), told_BK[:, 7:] / 8)
    assert not condition(probability=0, mirror=False).drawn(400, 0, 3, 0)[0].any()


def test_the_network_is_told_what_is_done() -> None:
    """The matrix, made again from the nine numbers alone."""
    told, turned_B22, _ = condition(probability=1.0, scale=0.3).drawn(200, 0, 3, 0)
    told = told.double()
    angle, axis = torch.atan2(told[:, 4], told[:, 3] + 1), torch.atan2(told[:, 6], told[:, 5])
    power = 0.2 * told[:, 5:7].norm(dim=1)

    def rotation(by: Tensor) -> Tensor:
        return torch.stack([by.cos(), -by.sin(), by.sin(), by.cos()], 1).view(-1, 2, 2)

    # n and b stand for the same two numbers as -n and the opposite b, which stretches where they shrink.
    found = torch.zeros(200, dtype=torch.bool)
    for sign in (1, -1):
        along = torch.diag_embed(torch.stack([2.0 ** (sign * power), 2.0 ** (-sign * power)], 1))
        again = rotation(axis) @ along @ rotation(-axis) @ rotation(angle)
        again = again * 2.0 ** (0.3 * told[:, 2, None, None])
        found |= (turned_B22 - again).abs().amax((1, 2)) < 1e-5
    assert found.all()


def done(x: Tensor, turned: list[list[float]], moved: tuple[float, float]) -> Tensor:
    """One picture, by a matrix and a translation."""
    matrix = torch.tensor([turned], dtype=torch.float64)
    place = augment._read_at(matrix, torch.tensor([moved], dtype=torch.float64), x.shape[2:])
    return augment._resampled(x, place)


@pytest.mark.parametrize("shape", [(2, 12, 12), (1, 8, 16)])
def test_a_picture_is_moved_turned_and_scaled(shape: tuple[int, ...]) -> None:
    x = pictures(1, shape)
    height, width = shape[1:]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(done(x, [[1, 0], [0, 1]], (0, 0)), x, **close)
    torch.testing.assert_close(done(x, [[-1, 0], [0, -1]], (0, 0)), x.flip(2, 3), **close)
    right = done(x, [[1, 0], [0, 1]], (0.25, 0))
    torch.testing.assert_close(right[..., width // 4 :], x[..., : -(width // 4)], **close)
    torch.testing.assert_close(  # beyond the border: the reflection
        right[..., : width // 4], x[..., : width // 4].flip(3), **close
    )
    down = done(x, [[1, 0], [0, 1]], (0, 0.25))
    torch.testing.assert_close(down[..., height // 4 :, :], x[..., : -(height // 4), :], **close)
    slope = torch.linspace(-1, 1, width).expand(1, 1, height, width).contiguous()
    inside = (..., slice(width // 4, -width // 4))
    doubled = done(slope, [[2, 0], [0, 2]], (0, 0))[inside]
    torch.testing.assert_close(doubled, slope[inside] / 2, rtol=0, atol=0.01)  # bicubic's own error
    if height == width:  # x to y, y to -x
        quarter = done(x, [[0, -1], [1, 0]], (0, 0))
        torch.testing.assert_close(quarter, torch.rot90(x, -1, (2, 3)), **close)


def test_mirroring_is_exact_and_what_is_not_chosen_stays() -> None:
    x0 = pictures()
    whole, told = condition(probability=0.3).augment(x0, 5, 0, 0)
    told_BK = told["augment"]
    kept = 0
    for x, y, one in zip(x0, whole, told_BK, strict=True):
        if not one[2:].any():
            x = x.flip(2) if one[0] else x
            assert torch.equal(x.flip(1) if one[1] else x, y)
            kept += 1
    assert 0 < kept < 40 and 0 < int(told_BK[:, 0].sum()) < 40 and int(told_BK[:, 1].sum()) > 0


def test_samples_are_told_that_nothing_was_done() -> None:
    one = condition()
    assert not one.default(range(3))["augment"].any()
    assert one.null(2, "cpu")["augment"].shape == (2, 9) and one.facts.null
    with pytest.raises(ValueError, match="leave augment=1 out"):
        one.asked(["1"])


@pytest.mark.parametrize(
    "facts",
    [
        Facts((4, 8, 8), Space("latents", (1.0,) * 4, (0.0,) * 4)),
        Facts((1, 8), Space.pixels(1)),
    ],
)
def test_only_pictures_are_turned(facts: Facts) -> None:
    with pytest.raises(ValueError, match=r"conditions\.augment turns and scales pictures"):
        augment.made(augment.Config(), "augment", facts)


def test_an_angle_is_uniform() -> None:
    told, _, _ = condition(probability=1.0).drawn(5_000, 0, 0, 0)
    angle = torch.atan2(told[:, 4].double(), told[:, 3].double() + 1) / math.pi
    assert abs(angle.mean()) < 4 * (1 / 3 / 5_000) ** 0.5
    assert abs(angle.abs().mean() - 0.5) < 4 * (1 / 12 / 5_000) ** 0.5
