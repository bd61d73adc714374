"""Precision, recall, density and coverage: how samples and real data lie among each other's nearest neighbours.

Around every point of a set is the ball that reaches to its k-th nearest neighbour in the set.

    precision   share of samples in some ball of the real data       (Kynkaanniemi et al., arXiv 1904.06991, eq. 2)
    recall      share of real data in some ball of the samples       (the same, roles exchanged)
    density     balls of real data that hold a sample, over k, mean over samples    (Naeem et al., arXiv 2002.09797)
    coverage    share of the real data's balls that hold a sample    (the same)

Each depends on the numbers of points, so both sets are taken to be of one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

K_PRECISION, K_DENSITY = 3, 5  # as in the two papers
MOST = 10_000  # points of each set; all pairs are looked at
BLOCK = 2**24  # distances in memory at once


def neighbours(
    samples_NF: np.ndarray,
    real_MF: np.ndarray,
    *,
    k_precision: int = K_PRECISION,
    k_density: int = K_DENSITY,
    most: int = MOST,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The four numbers, with k and the size of both sets.

    Sets larger than the smaller one, or than `most`, are thinned out by a draw that `seed` decides. Distances are
    Euclidean in float64; a ball holds its surface. Raises ValueError for sets of no more than k points.
    """
    size = min(len(samples_NF), len(real_MF), most)
    if size <= max(k_precision, k_density):
        raise ValueError(
            f"{max(k_precision, k_density)} nearest neighbours need more than as many samples, not {size}"
        )
    chosen = [_some(rows, size, seed + i, device) for i, rows in enumerate((samples_NF, real_MF))]
    centre = chosen[1].mean(0)  # far from the origin squares would lose digits
    samples, real = (rows - centre for rows in chosen)
    of_samples = _radii(samples, (k_precision,))[0]
    of_real, wide = _radii(real, (k_precision, k_density))
    precise = torch.zeros(size, dtype=torch.bool, device=device)
    recalled, held = torch.zeros_like(precise), torch.zeros(size, dtype=torch.int64, device=device)
    balls = 0
    for rows, squares in _blocks(real, samples):  # [real, samples]
        precise |= (squares <= of_real[rows, None]).any(0)
        recalled[rows] = (squares <= of_samples[None]).any(1)
        inside = squares <= wide[rows, None]
        held[rows] = inside.sum(1)
        balls += int(inside.sum())
    return {
        "precision": float(precise.double().mean()),
        "recall": float(recalled.double().mean()),
        "density": balls / (k_density * size),
        "coverage": float((held > 0).double().mean()),
        "k": [k_precision, k_density],
        "size": size,
        "seed": seed,
    }


def _some(rows: np.ndarray, size: int, seed: int, device: torch.device | str) -> Tensor:
    if len(rows) > size:
        rows = rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:size])]
    return torch.from_numpy(np.asarray(rows, np.float64)).to(device)


def _radii(rows: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Squared distance of every row to its k-th nearest other one, for each k."""
    found: list[list[Tensor]] = [[] for _ in ks]
    for part, squares in _blocks(rows, rows):
        itself = torch.arange(len(squares), device=rows.device)
        squares[itself, itself + part.start] = torch.inf
        nearest = squares.topk(max(ks), largest=False).values
        for each, k in zip(found, ks, strict=True):
            each.append(nearest[:, k - 1])
    return [torch.cat(each) for each in found]


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows of a, their squared distances to all of b), a part at a time."""
    step = max(1, BLOCK // len(b))
    squares_b = b.square().sum(1)
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        part = a[rows]
        product = torch.addmm(squares_b[None], part, b.T, alpha=-2)
        yield rows, (product + part.square().sum(1)[:, None]).clamp_(min=0)
