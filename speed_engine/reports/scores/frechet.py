"""The Frechet distance of two sets of features, and what real data score against themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_SPLITS = 10  # random splits of the real data behind the floor and its spread


def moments(features_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean [F], covariance [F, F]) in float64. Raises ValueError for fewer than 2 rows."""
    if len(features_NF) < 2:
        raise ValueError(
            f"a Frechet distance needs at least 2 samples in each set, not {len(features_NF)}"
        )
    rows = features_NF.astype(np.float64)
    return rows.mean(0), np.atleast_2d(np.cov(rows, rowvar=False))


def of_moments(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, float64.

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Heusel et al., arXiv 1706.08500, eq. 6). The
    root's trace is the sum of the roots of the eigenvalues of a symmetric matrix; no general
    matrix square root, whose builds disagree, is needed.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0)).sum()
    shift = np.sum((mean_a - mean_b) ** 2)
    distance = shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return max(0.0, float(distance))  # rounding may leave -1e-15


def frechet_distance(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
    """`of_moments` of the Gaussians fitted to two sets of features. Raises ValueError for fewer than 2 rows."""
    return of_moments(*moments(a_NF), *moments(b_MF))


def mean_and_spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over random splits."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1))}


def distance_and_floor(features_NF: np.ndarray, real_MF: np.ndarray) -> dict[str, Any]:
    """The distance of samples to all real data, and beside it what real data score against
    themselves.

    The estimate is biased upwards, the more the fewer samples, so that the two numbers to compare
    are `same_size` (n samples against the real data without n of them) and `floor` (those n real
    ones against the same rest), n = min(N, M // 2), each a mean and spread over random splits.
    `excess` is their difference; it is negative where the samples are copies of real data.
    """
    num, half = len(features_NF), len(real_MF) // 2
    size = min(num, half)
    rng = np.random.default_rng(0)
    same_size, floor = [], []
    for _ in range(NUM_SPLITS):
        order = rng.permutation(len(real_MF))
        left_out, rest = real_MF[order[:size]], real_MF[order[size:]]
        floor.append(frechet_distance(left_out, rest))
        same_size.append(frechet_distance(features_NF[rng.permutation(num)[:size]], rest))
    return {
        "distance": frechet_distance(features_NF, real_MF),
        "same_size": mean_and_spread(same_size),
        "floor": mean_and_spread(floor),
        "excess": float(np.mean(same_size) - np.mean(floor)),
        "size": size,
        "splits": NUM_SPLITS,
    }
