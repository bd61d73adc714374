"""Labels and vectors: what is dropped, what "none" is, what a person may ask for."""

from __future__ import annotations

import pytest
import torch

from speed_engine.conditions import label, vector
from speed_engine.data import ArrayFacts, ConditionFacts

NAMES = ["cat", "dog", "2"]


def a_label(dropout: float = 0.1, num: int = 10, names: list[str] | None = None) -> label.Label:
    return label.build(label.Config(dropout=dropout), "label", label.described(num, names or []))


def a_vector(dropout: float = 0.0, name: str = "vector", width: int = 3) -> vector.Vector:
    facts = ConditionFacts("vector", {name: ArrayFacts((width,), "float16")})
    return vector.build(vector.Config(dropout=dropout), name, facts)


def test_labels_are_dropped_by_address():
    number = torch.arange(20_000) % 10
    stored = {"label": number}
    dropped = a_label().drop(stored, 0, 3, 0)["label"]
    gone = dropped == 10
    assert abs(gone.double().mean() - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    assert torch.equal(dropped[~gone], number[~gone])
    half = a_label().drop({"label": number[10_000:]}, 0, 3, 10_000)["label"]
    assert torch.equal(half, dropped[10_000:])
    assert a_label(0.0).drop(stored, 0, 3, 0)["label"] is number


def test_labels_dropped_are_those_of_the_first_version():
    """Sixteen slots of seed 5, step 9: runs go on as they began."""
    dropped = a_label(0.3).drop({"label": torch.zeros(16, dtype=torch.int64)}, 5, 9, 0)["label"]
    assert (dropped == 10).nonzero().flatten().tolist() == [3, 6, 10]


def test_the_null_label_exists_where_labels_are_dropped():
    assert a_label().null(2, "cpu")["label"].tolist() == [10, 10] and a_label().facts.null
    assert not a_label(0.0).facts.null
    with pytest.raises(ValueError, match=r"conditions.label.dropout=0"):
        a_label(0.0).null(2, "cpu")


def test_a_class_is_asked_for_by_name_or_number():
    one = a_label(num=3, names=NAMES)
    assert one.asked(["dog", "0", "2"])["label"].tolist() == [1, 0, 2]  # "2" is a name here
    assert one.default(range(5))["label"].tolist() == [0, 1, 2, 0, 1]
    for wrong in ("3", "-1", "cow", "1.5", "", "²"):
        with pytest.raises(ValueError, match=r"from 0 to 2.*cat, dog, 2"):
            one.asked([wrong])


def test_vectors_are_dropped_by_address_and_apart_from_each_other():
    stored = torch.ones(20_000, 3, dtype=torch.float16)
    one, other = (a_vector(0.25, name).drop({name: stored}, 0, 3, 0)[name] for name in "ab")
    assert one.dtype == torch.float32 and torch.equal(one.any(1), one.all(1))
    for kept in (one.any(1), other.any(1)):
        assert abs(kept.double().mean() - 0.75) < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    both = (one.any(1) & other.any(1)).double().mean()
    assert abs(both - 0.75**2) < 4 * (0.5625 * 0.4375 / 20_000) ** 0.5
    half = a_vector(0.25, "a").drop({"a": stored[10_000:]}, 0, 3, 10_000)["a"]
    assert torch.equal(half, one[10_000:])


def test_a_vector_is_asked_for_by_its_numbers():
    assert a_vector().asked(["1,2.5,-3"])["vector"].tolist() == [[1.0, 2.5, -3.0]]
    for wrong in ("1,2", "1,2,nan", "a,b,c", ""):
        with pytest.raises(ValueError, match="3 finite numbers"):
            a_vector().asked([wrong])
    assert a_vector(0.1).default(range(2))["vector"].tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match=r"--condition vector=0,0,0"):
        a_vector().default(range(2))
    with pytest.raises(ValueError, match=r"conditions.vector.dropout=0"):
        a_vector().null(1, "cpu")


def test_data_without_the_array_are_refused():
    wrong = ConditionFacts("vector", {"vector": ArrayFacts((), "int64")})
    with pytest.raises(ValueError, match=r"conditions.vector is a vector, but the data hold none"):
        vector.build(vector.Config(), "vector", wrong)
    with pytest.raises(
        ValueError, match=r"conditions.label is a label, but the data hold no class"
    ):
        label.build(label.Config(), "label", wrong)
