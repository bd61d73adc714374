"""A set in two parts: disjoint, together the whole, the same at any time."""

import numpy as np
import pytest
import torch

from speed_engine.data import DataError, Facts
from speed_engine.data.space import Space
from speed_engine.data.split import split


class Numbers:
    """Sample i holds the number i."""

    facts = Facts((1, 1, 1), Space.pixels(1))
    fingerprint = "f" * 64
    remarks = ("a remark",)

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, indices, flips=None):
        number = torch.as_tensor(np.asarray(indices))
        assert ((number >= 0) & (number < self.size)).all()
        return number.view(-1, 1, 1, 1), {
            "flipped": torch.as_tensor(flips if flips is not None else [])
        }

    def decode(self, stored, normals=None):
        return stored.float()


def numbers(part) -> list[int]:
    return part.read(np.arange(len(part)))[0].flatten().tolist()


@pytest.mark.parametrize(("size", "count"), [(10, 1), (10, 5), (1797, 200), (5, 2)])
def test_the_parts_make_the_whole(size, count):
    train, held = split(Numbers(size), count)
    assert (len(train), len(held)) == (size - count, count)
    assert sorted(numbers(train) + numbers(held)) == list(range(size))
    assert numbers(train) == sorted(numbers(train))  # what is left keeps its order
    assert train.whole([0, len(train) - 1]).tolist() == [numbers(train)[0], numbers(train)[-1]]


def test_the_split_is_of_the_set_alone_and_not_its_beginning():
    first, again = split(Numbers(1000), 100)[1], split(Numbers(1000), 100)[1]
    assert numbers(first) == numbers(again)
    assert np.mean(numbers(first)) == pytest.approx(500, abs=100)
    larger = set(numbers(split(Numbers(1000), 200)[1]))
    assert set(numbers(first)) < larger  # a larger one holds the smaller


def test_what_a_part_tells():
    source = Numbers(100)
    train, held = split(source, 10)
    assert train.fingerprint == source.fingerprint and held.fingerprint != source.fingerprint
    assert held.fingerprint != split(source, 11)[1].fingerprint
    assert train.facts is source.facts and list(train.remarks) == ["a remark"]
    _, arrays = train.read(torch.tensor([3, 4]), torch.tensor([True, False]))
    assert arrays["flipped"].tolist() == [True, False]


@pytest.mark.parametrize("count", [0, 51, 1000])
def test_too_much(count):
    with pytest.raises(DataError, match=r"validation\.samples"):
        split(Numbers(100), count)
