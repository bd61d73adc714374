"""scikit-learn's 1,797 scanned digits as a judge: classifier, feature space, and what is a copy.

How often a sample is what it was asked to be, how far the distribution is from the real one beside the distance of real
scans from each other, and whether samples repeat scans.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from speed_engine.reports.scores.frechet import distance_and_floor

NUM_FEATURES = 32  # principal components of the real scans: 96.6 % of their variance
HELD_OUT = 599  # scans the classifier never sees: a third, of all classes equally
FULL_INK = 16  # the largest pixel of the scans
SHAPE = (8, 8, 1)
NAMES = tuple("0123456789")


@dataclass(frozen=True)
class Digits:
    """The real scans with what is learned from them: the classifier and the feature space."""

    ink_NP: np.ndarray  # float64 [1797, 64], 0 to 16
    labels_N: np.ndarray  # int64
    classifier: Any
    held_out: np.ndarray  # indices of the scans the classifier has not seen
    accuracy: float  # on those
    mean_P: np.ndarray
    directions_PF: np.ndarray  # principal directions over their standard deviations

    def features(self, ink_NP: np.ndarray) -> np.ndarray:
        """Ink [N, 64] -> [N, 32] principal components, each of unit variance over the real scans."""
        return (ink_NP - self.mean_P) @ self.directions_PF


def real_digits() -> Digits:
    """The scans, a support vector classifier trained on two thirds of them, and the feature space.

    Everything is fixed (split, classifier, components), so scores can be compared. Raises
    ValueError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC
    except ImportError as error:
        raise ValueError(
            "scoring digits needs scikit-learn; pip install 'speed-engine[demo]'"
        ) from error
    ink, labels = load_digits(return_X_y=True)
    split: Any = train_test_split(
        np.arange(len(ink)), test_size=HELD_OUT, random_state=0, stratify=labels
    )
    seen, held_out = split
    support_vectors: Any = SVC  # its stubs know no number for gamma
    classifier = support_vectors(gamma=0.001).fit(ink[seen], labels[seen])
    mean = ink.mean(0)
    _, spread, directions = np.linalg.svd(ink - mean, full_matrices=False)
    unit = spread[:NUM_FEATURES, None] / np.sqrt(len(ink) - 1)
    return Digits(
        ink,
        labels,
        classifier,
        held_out,
        float(classifier.score(ink[held_out], labels[held_out])),
        mean,
        (directions[:NUM_FEATURES] / unit).T,
    )


def class_agreement(
    predicted_N: np.ndarray, labels_N: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """How often a sample drawn for class c is classified as c: over all, and for each class by its name."""
    agrees = predicted_N == labels_N
    table = {
        names[c]: {
            "samples": int((labels_N == c).sum()),
            "agreement": float(agrees[labels_N == c].mean()),
        }
        for c in np.unique(labels_N).tolist()
    }
    return {"agreement": float(agrees.mean()), "by_class": table}


def predicted_share(predicted_N: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """The share of samples that the classifier takes for each class, by its name."""
    return {name: float((predicted_N == c).mean()) for c, name in enumerate(names)}


def memorisation(ink_NP: np.ndarray, real_MP: np.ndarray) -> dict[str, float]:
    """Distance of samples to the nearest real scan, beside that of each real scan to the nearest
    other one.

    Euclidean, in units of ink (0 to 16 a pixel). A ratio of medians well under 1, or many `copies`
    (samples nearer to a scan than 99 % of the scans are to each other), means that the network
    repeats its training data.
    """
    blocks = [ink_NP[i : i + 4096] for i in range(0, len(ink_NP), 4096)]
    to_real = np.sqrt(np.concatenate([_squared_distances(b, real_MP).min(1) for b in blocks]))
    among = _squared_distances(real_MP, real_MP)
    np.fill_diagonal(among, np.inf)
    real_to_real = np.sqrt(among.min(1))
    near = float(np.quantile(real_to_real, 0.01))
    return {
        "median_sample_to_real": float(np.median(to_real)),
        "median_real_to_real": float(np.median(real_to_real)),
        "ratio": float(np.median(to_real) / np.median(real_to_real)),
        "copies": float((to_real < near).mean()),
        "copy_threshold": near,
    }


def _squared_distances(a_NP: np.ndarray, b_MP: np.ndarray) -> np.ndarray:
    """|a - b|^2 of all pairs, [N, M]."""
    squares = (a_NP**2).sum(1)[:, None] + (b_MP**2).sum(1)[None] - 2 * a_NP @ b_MP.T
    return squares.clip(0)


def score_digits(pixels_NHWC: np.ndarray, labels_N: np.ndarray | None) -> dict[str, Any]:
    """The report on samples of digits: uint8 [N, 8, 8, 1], 255 = full ink; labels 0 to 9 or None.

    Raises ValueError for other shapes or labels, or fewer than 2 samples.
    """
    num = len(pixels_NHWC)
    if pixels_NHWC.shape[1:] != SHAPE:
        raise ValueError(
            f"digits are 8 x 8 x 1 pixels, these samples are {pixels_NHWC.shape[1:]}; give another reference"
        )
    if labels_N is not None and not np.isin(labels_N, np.arange(10)).all():
        raise ValueError("the labels of digits are 0 to 9; these samples have others")
    digits = real_digits()
    ink = _ink(pixels_NHWC)
    warnings = []
    if num <= NUM_FEATURES:
        warnings.append(
            f"{num} samples cannot fill {NUM_FEATURES} dimensions: the covariance has rank {num - 1} at most "
            "and the Frechet distance says little; draw more samples"
        )
    predicted = digits.classifier.predict(ink)
    report: dict[str, Any] = {
        "kind": "digits",
        "num_samples": num,
        "class_agreement": None
        if labels_N is None
        else class_agreement(predicted, labels_N, NAMES),
        "predicted_share": predicted_share(predicted, NAMES),
        "frechet": distance_and_floor(digits.features(ink), digits.features(digits.ink_NP)),
        "memorisation": memorisation(ink, digits.ink_NP),
        "classifier": {
            "kind": "scikit-learn SVC(gamma=0.001)",
            "trained_on": len(digits.ink_NP) - len(digits.held_out),
            "held_out": len(digits.held_out),
            "held_out_accuracy": digits.accuracy,
        },
        "feature_space": f"first {NUM_FEATURES} principal components of the real scans, unit variance each",
        "reference": {
            "name": "scikit-learn digits",
            "num": len(digits.ink_NP),
            "sha256": hashlib.sha256(digits.ink_NP.tobytes()).hexdigest(),
        },
        "warnings": warnings,
        "versions": {name: version(name) for name in ("scikit-learn", "numpy")},
    }
    return report


def both_features(pixels_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features of samples, of all real scans), in the space of `score_digits`."""
    digits = real_digits()
    return digits.features(_ink(pixels_NHWC)), digits.features(digits.ink_NP)


def _ink(pixels_NHWC: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 8, 1] -> [N, 64], 0 to 16."""
    return pixels_NHWC.reshape(len(pixels_NHWC), -1).astype(np.float64) * (FULL_INK / 255)
