"""Neighbours and kernel distance: against loops that say the papers' formulas in so many words, and on known sets."""

from __future__ import annotations

import numpy as np
import pytest

from speed_engine.reports.scores import nearest as file
from speed_engine.reports.scores.kernel import kernel_distance, squared_mmd
from speed_engine.reports.scores.nearest import neighbours


def by_loops(fake: np.ndarray, real: np.ndarray, near: int, wide: int) -> dict[str, float]:
    def distance(a, b) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(points, i: int, k: int) -> float:
        others = sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)
        return others[k - 1]

    real_near = [radius(real, i, near) for i in range(len(real))]
    real_wide = [radius(real, i, wide) for i in range(len(real))]
    fake_near = [radius(fake, j, near) for j in range(len(fake))]
    precision = [
        any(distance(y, x) <= r for x, r in zip(real, real_near, strict=True)) for y in fake
    ]
    recall = [any(distance(x, y) <= r for y, r in zip(fake, fake_near, strict=True)) for x in real]
    balls = [[distance(y, x) <= r for x, r in zip(real, real_wide, strict=True)] for y in fake]
    return {
        "precision": float(np.mean(precision)),
        "recall": float(np.mean(recall)),
        "density": float(np.mean([sum(row) / wide for row in balls])),
        "coverage": float(np.mean(np.any(balls, axis=0))),
    }


@pytest.mark.parametrize("block", [2**24, 50])
@pytest.mark.parametrize(("near", "wide"), [(3, 5), (1, 2)])
def test_neighbours_are_those_of_the_papers(monkeypatch, block, near, wide) -> None:
    monkeypatch.setattr(file, "BLOCK", block)  # the second: one row at a time
    rng = np.random.default_rng(near)
    real = rng.normal(size=(40, 3)) + 100  # far from the origin
    fake = 0.7 * rng.normal(size=(40, 3)) + 101
    found = neighbours(fake, real, k_precision=near, k_density=wide)
    wanted = by_loops(fake, real, near, wide)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert 0 < wanted["recall"] < wanted["precision"] < 1  # it says something
    assert (found["k"], found["size"], found["seed"]) == ([near, wide], 40, 0)


def test_neighbours_of_sets_that_are_known() -> None:
    rng = np.random.default_rng(0)
    real, same, far = rng.normal(size=(3, 600, 4))
    alike = neighbours(same, real)
    assert alike["density"] == pytest.approx(1, abs=0.1)  # the paper's expectation for equal laws
    assert alike["coverage"] == pytest.approx(1 - 0.5**5, abs=0.03)  # 1 - (N-1)...(N-k) / (2N-1)...
    copies = neighbours(real, real)
    assert copies["precision"] == copies["recall"] == copies["coverage"] == 1
    away = neighbours(far + 100, real)
    assert [away[key] for key in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]
    one = neighbours(np.repeat(real[:1], 600, axis=0) + 1e-3 * same, real)
    assert one["precision"] > 0.9 and one["recall"] < 0.05 and one["coverage"] < 0.05


def test_sets_of_different_size_are_thinned_out_by_the_seed() -> None:
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(300, 2)), rng.normal(size=(90, 2)) + 0.5
    first = neighbours(fake, real)
    assert first["size"] == 90 and first == neighbours(fake, real)
    assert first != neighbours(fake, real, seed=5) | {"seed": 0}
    assert neighbours(fake, real, most=50)["size"] == 50
    with pytest.raises(
        ValueError, match="5 nearest neighbours need more than as many samples, not 5"
    ):
        neighbours(fake[:5], real)


def test_the_kernel_distance_is_the_papers_formula() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(9, 3)) + 1

    def kernel(a, b) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    first = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    second = sum(kernel(y[i], y[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    cross = sum(kernel(a, b) for a in x for b in y) / (7 * 9)
    assert squared_mmd(x, y) == pytest.approx(first + second - 2 * cross, rel=1e-12)


def test_subsets_say_how_sure_the_kernel_distance_is() -> None:
    rng = np.random.default_rng(2)
    a, b, shifted = rng.normal(size=(3, 800, 6))
    same = kernel_distance(a, b, size=100)
    low, high = same["interval"]
    assert low < 0 < high and abs(same["mean"]) < 0.05 and same["size"] == 100
    other = kernel_distance(a, shifted + 1, size=100)
    assert other["interval"][0] > 0 and other["mean"] > 10 * same["std"]
    whole = squared_mmd(a, shifted + 1)  # unbiased: subsets of any size have it as their mean
    assert other["mean"] == pytest.approx(whole, abs=4 * other["std"] / 10)
    assert kernel_distance(a, b, size=100) == same != kernel_distance(a, b, size=100, seed=1)
    assert kernel_distance(a[:10], b)["size"] == 5  # half of the smaller set
    with pytest.raises(ValueError, match="at least 4 samples in each set, not 3 and 800"):
        kernel_distance(a[:3], b)
