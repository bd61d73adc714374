"""The files of a training state: what they hold, and what is said where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from speed_kernels.adamw_ema.optimizer import AdamWEMA
from torch import Tensor, nn

from speed_engine.engines import shards
from speed_engine.engines.shards import Part, Shards


def holders(seed: int) -> list[nn.Parameter]:
    """A matrix whose memory is in column order, and a vector."""
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(6, 4).t()), nn.Parameter(torch.randn(5))]


def whole(own: list[nn.Parameter]) -> list[Part]:
    return [
        Part(name, tuple(p.shape), 0, p.numel(), p, 0)
        for name, p in zip(("matrix", "vector"), own, strict=True)
    ]


def trained(own: list[nn.Parameter], updates: tuple[int, int] = (2, 2)) -> AdamWEMA:
    optimizer = AdamWEMA(own, lr=0.1, backend="reference")
    for step in range(max(updates)):
        for p, count in zip(own, updates, strict=True):
            p.grad = torch.randn_like(p) if step < count else None
        optimizer.step()
    return optimizer


def saved(folder: Path, updates: tuple[int, int] = (2, 2)) -> tuple[list[nn.Parameter], AdamWEMA]:
    own = holders(1)
    optimizer = trained(own, updates)
    state = shards.collected(
        whole(own), optimizer, index=0, files=1, frozen={"table": torch.ones(3)}, counts={"a": 7}
    )
    for name, value in state.items():
        shards.write(value, folder / name)
    return own, optimizer


def cut(flat: Tensor, numel: tuple[int, int] = (24, 5)) -> list[Part]:
    """Elements 7 to the end of the matrix, then the whole vector, as a partition of ZeRO's holds them."""
    return [
        Part("matrix", (4, 6), 7, numel[0] - 7, flat, 0),
        Part("vector", (5,), 0, numel[1], flat, numel[0] - 7),
    ]


def test_a_piece_holds_the_elements_row_by_row(tmp_path):
    own, optimizer = saved(tmp_path)
    flat = torch.full((24,), -1.0)
    other = AdamWEMA([flat], backend="reference")
    with Shards(tmp_path) as state:
        shards.restore(cut(flat), other, state)
        assert state.counts == {"a": 7} and state.frozen.keys() == {"table"}

    def expected(of: list[Tensor]) -> Tensor:
        return torch.cat([of[0].detach().reshape(-1)[7:], of[1].detach()])

    assert torch.equal(flat[:22], expected(own)) and (flat[22:] == -1).all()
    for key in ("exp_avg", "exp_avg_sq", "ema"):
        found = other.state[flat][key]
        assert torch.equal(found[:22], expected([optimizer.state[p][key] for p in own]))
        assert not found[22:].any()
    assert other.state[flat]["step"].item() == 2


def test_and_goes_on_as_before(tmp_path):
    own, optimizer = saved(tmp_path)
    again = holders(2)
    other = trained(again, (1, 3))
    with Shards(tmp_path) as state:
        shards.restore(whole(again), other, state)
    for params, each in ((own, optimizer), (again, other)):
        torch.manual_seed(5)
        for p in params:
            p.grad = torch.randn(p.shape)
        each.step()
    for p, q in zip(own, again, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(v, other.state[q][k]) for k, v in optimizer.state[p].items())


def test_counts_that_one_holder_cannot_keep_are_refused(tmp_path):
    saved(tmp_path, (2, 1))
    flat = torch.zeros(22)
    with (
        Shards(tmp_path) as state,
        pytest.raises(ValueError, match=r"matrix has had other updates.*zero=0"),
    ):
        shards.restore(cut(flat), AdamWEMA([flat], backend="reference"), state)


def test_a_parameter_that_was_never_updated_is_its_own_average(tmp_path):
    own, _ = saved(tmp_path, (2, 0))
    flat = torch.zeros(22)
    other = AdamWEMA([flat], backend="reference")
    with Shards(tmp_path) as state:
        shards.restore(cut(flat), other, state)
    assert torch.equal(other.state[flat]["ema"][17:], own[1].detach())
    assert not other.state[flat]["exp_avg"][17:].any()


def changed(path: Path, **layout: object) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["layout"]) | layout
    save_file(tensors, path, {"layout": json.dumps(told)})


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"files": 2}, "it has 1 of 2 files"),
        ({"format": 9}, "has the format 9, and this version knows 1"),
        ({"pieces": {}}, "holds no parameter matrix: it is of another network"),
        (
            {"pieces": {"matrix": {"start": 0, "shape": [6, 4], "counts": {}}}},
            r"holds matrix as \[6, 4\], but the network has \[4, 6\]",
        ),
        (
            {"pieces": {"matrix": {"start": 3, "shape": [4, 6], "counts": {}}}},
            "lacks 3 elements of matrix",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, layout, words):
    saved(tmp_path)
    changed(tmp_path / "shard-00000.safetensors", **layout)
    own = holders(2)
    with pytest.raises(ValueError, match=words), Shards(tmp_path) as state:
        shards.restore(whole(own), AdamWEMA(own, backend="reference"), state)
