"""The kernel distance of two sets of features: squared maximum mean discrepancy with KID's polynomial kernel.

k(x, y) = (x . y / F + 1)^3, the unbiased estimate (Binkowski et al., arXiv 1801.01401, equation 4), on random subsets;
it needs no Gaussian, is unbiased at any size, and its values over the subsets say how sure it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(
    samples_NF: np.ndarray,
    real_MF: np.ndarray,
    *,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean, standard deviation and the middle 95 % of the estimates on `subsets` pairs of subsets.

    size: of a subset; at most half of the smaller set, so that subsets differ. Raises ValueError for sets of fewer than
    4 rows.
    """
    size = min(size, len(samples_NF) // 2, len(real_MF) // 2)
    if size < 2:
        raise ValueError(
            f"a kernel distance needs at least 4 samples in each set, not {len(samples_NF)} and {len(real_MF)}"
        )
    rng = np.random.default_rng(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        x, y = (
            rows[rng.choice(len(rows), size, replace=False)].astype(np.float64)
            for rows in (samples_NF, real_MF)
        )
        values[i] = squared_mmd(x, y)
    low, high = np.quantile(values, (0.025, 0.975))
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)),
        "interval": [float(low), float(high)],
        "subsets": subsets,
        "size": size,
        "seed": seed,
    }


def squared_mmd(x_NF: np.ndarray, y_MF: np.ndarray) -> float:
    """The unbiased estimate from all pairs; it is negative by chance where the sets are alike."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        base = a @ b.T / a.shape[1] + 1
        return base * base * base  # a power is ten times slower

    def among(a: np.ndarray) -> float:
        pairs = kernel(a, a)
        return float(pairs.sum() - np.trace(pairs)) / (len(a) * (len(a) - 1))

    return among(x_NF) + among(y_MF) - 2 * float(kernel(x_NF, y_MF).mean())
