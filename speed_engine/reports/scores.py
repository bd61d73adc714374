"""How good samples are: digits by a small classifier and a Frechet distance, images by
torch-fidelity.

`score(samples, "digits")` judges a folder of samples against scikit-learn's 1,797 scanned digits:
how often a sample is what it was asked to be, how far the distribution is from the real one beside
the distance of real scans from each other, and whether samples are copies. `score(samples,
FOLDER)` gives FID, KID, Inception score, precision and recall against a folder of images. Each
report carries the samples' recipe, so that no number stands alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.atomic_files import write_json
from speed_engine.sampling.folder import read_recipe, read_samples

NUM_FEATURES = 32  # principal components of the real scans: 96.6 % of their variance
NUM_SPLITS = 10  # random splits of the real scans behind the floor and its spread
HELD_OUT = 599  # scans the classifier never sees: a third, of all classes equally
FULL_INK = 16  # the largest pixel of the scans
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")
EXTRACTOR = "inception-v3-compat"  # torch-fidelity's port of the original FID network


def score(
    samples: Path, reference: str | Path, out: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Judge the folder `samples` and write the report as JSON to `out` (default
    samples/score.json).

    reference: the word "digits", or a folder of real images. options: of `score_images`. Returns
    the report. Raises ValueError for an unfinished folder, a missing package or a reference that
    does not fit.
    """
    recipe = read_recipe(samples)
    if str(reference) == "digits":
        if options:
            raise ValueError(f"scoring digits has no option {next(iter(options))!r}; leave it out")
        report = score_digits(*read_samples(samples))
    else:
        report = score_images(samples / "images", Path(reference), **options)
    report = {**report, "samples": str(samples), "recipe": recipe}
    write_json(out or samples / "score.json", report)
    return report


def headline(report: dict[str, Any]) -> str:
    """The first numbers of a report, in words."""
    if "frechet" not in report:
        found = report["metrics"]["frechet_inception_distance"]
        return f"Frechet distance {found:.4g} ({report['feature_space']})"
    frechet = report["frechet"]["same_size"]["mean"]
    floor = report["frechet"]["floor"]["mean"]
    agreement = report["class_agreement"]
    told = "" if agreement is None else f", class agreement {agreement['agreement']:.3f}"
    return f"Frechet distance {frechet:.4g} (real data among themselves {floor:.4g}){told}"


# ---------------------------------------------------------------------------- Frechet distance


def frechet_distance(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to two sets of features, float64.

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Heusel et al., arXiv 1706.08500, eq. 6). The
    root's trace is the sum of the roots of the eigenvalues of a symmetric matrix; no general
    matrix square root, whose builds disagree, is needed. Raises ValueError for fewer than 2 rows.
    """
    if min(len(a_NF), len(b_MF)) < 2:
        raise ValueError(
            f"a Frechet distance needs at least 2 samples in each set, not {len(a_NF)} and {len(b_MF)}"
        )
    a, b = a_NF.astype(np.float64), b_MF.astype(np.float64)
    covariance_a = np.atleast_2d(np.cov(a, rowvar=False))
    covariance_b = np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0)).sum()
    shift = np.sum((a.mean(0) - b.mean(0)) ** 2)
    distance = shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return max(0.0, float(distance))  # rounding may leave -1e-15


def _mean_and_spread(values: list[float]) -> dict[str, float]:
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
        "same_size": _mean_and_spread(same_size),
        "floor": _mean_and_spread(floor),
        "excess": float(np.mean(same_size) - np.mean(floor)),
        "size": size,
        "splits": NUM_SPLITS,
    }


# ---------------------------------------------------------------------------- digits


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


def class_agreement(digits: Digits, ink_NP: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    """How often a sample drawn for class c is classified as c: over all, and for each class."""
    agrees = digits.classifier.predict(ink_NP) == labels_N
    table = {
        str(c): {
            "samples": int((labels_N == c).sum()),
            "agreement": float(agrees[labels_N == c].mean()),
        }
        for c in np.unique(labels_N).tolist()
    }
    return {"agreement": float(agrees.mean()), "by_class": table}


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
    if pixels_NHWC.shape[1:] != (8, 8, 1):
        raise ValueError(
            f"digits are 8 x 8 x 1 pixels, these samples are {pixels_NHWC.shape[1:]}; give another reference"
        )
    if labels_N is not None and not np.isin(labels_N, np.arange(10)).all():
        raise ValueError("the labels of digits are 0 to 9; these samples have others")
    digits = real_digits()
    ink = pixels_NHWC.reshape(num, -1).astype(np.float64) * (FULL_INK / 255)
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
        "class_agreement": None if labels_N is None else class_agreement(digits, ink, labels_N),
        "predicted_share": {str(c): float((predicted == c).mean()) for c in range(10)},
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


def judge_of(data_kind: str) -> Callable[[np.ndarray, np.ndarray | None], dict[str, float]] | None:
    """What scores a few pictures while training runs on data of this kind; None where they have no score of their own.

    It takes pixels uint8 NHWC and labels, and returns the headline numbers of `score`.
    """
    return _headline if data_kind == "digits" else None


def _headline(pixels_NHWC: np.ndarray, labels_N: np.ndarray | None) -> dict[str, float]:
    report = score_digits(pixels_NHWC, labels_N)
    agreement, distance = report["class_agreement"], report["frechet"]["same_size"]["mean"]
    told = {} if agreement is None else {"class_agreement": agreement["agreement"]}
    return told | {"frechet_distance": distance}


# ---------------------------------------------------------------------------- images


def score_images(
    images: Path, reference: Path, *, batch_size: int = 64, cuda: bool | None = None
) -> dict[str, Any]:
    """FID, KID, Inception score, precision and recall of two image folders, by torch-fidelity.

    cuda: default where there is a device. Raises ValueError if torch-fidelity is missing or a
    folder has fewer than 2 images.
    """
    numbers = {folder: len(_image_files(folder)) for folder in (images, reference)}
    for folder, num in numbers.items():
        if num < 2:
            raise ValueError(f"{folder} holds {num} PNG or JPEG files; give a folder of images")
    try:
        import torch_fidelity  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "scoring images needs torch-fidelity; pip install 'speed-engine[score]'"
        ) from error
    if cuda is None:
        import torch

        cuda = torch.cuda.is_available()
    smaller = min(numbers.values())
    values = torch_fidelity.calculate_metrics(
        input1=str(images),  # the generated set comes first: precision and recall are not symmetric
        input2=str(reference),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=min(1000, smaller),
        feature_extractor=EXTRACTOR,
        batch_size=batch_size,
        cuda=cuda,
        verbose=False,
    )
    warnings = []
    if smaller <= 2048:
        warnings.append(
            f"{smaller} images cannot fill the 2048 features of FID: the covariance has rank {smaller - 1} at "
            "most; FID from under 10,000 images is biased upwards and not comparable with published numbers"
        )
    return {
        "kind": "images",
        "num_samples": numbers[images],
        "metrics": {name: float(value) for name, value in values.items()},
        "kid_subset_size": min(1000, smaller),
        "feature_space": f"torch-fidelity {EXTRACTOR}",
        "reference": {
            "name": str(reference),
            "num": numbers[reference],
            "listing_sha256": _listing_hash(reference),
        },
        "warnings": warnings,
        "versions": {"torch-fidelity": version("torch-fidelity")},
    }


def _image_files(folder: Path) -> list[Path]:
    """The images directly in `folder`, sorted. Raises ValueError if it is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of images, or the word digits")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)


def _listing_hash(folder: Path) -> str:
    """Hash of the images' names and sizes: tells two reference sets apart without reading them."""
    listing = "\n".join(f"{p.name} {p.stat().st_size}" for p in _image_files(folder))
    return hashlib.sha256(listing.encode()).hexdigest()
