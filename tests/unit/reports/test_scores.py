"""Scores: the Frechet mathematics on known Gaussians, and digits on real scans."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from speed_engine.reports.scores import score
from speed_engine.reports.scores.digits import (
    NUM_FEATURES,
    memorisation,
    real_digits,
    score_digits,
)
from speed_engine.reports.scores.frechet import distance_and_floor, frechet_distance
from speed_engine.sampling.folder import write_json


def gaussian(rng, num: int, mean, factor) -> np.ndarray:
    return rng.normal(size=(num, len(mean))) @ np.asarray(factor).T + mean


def with_moments(rng, num: int, mean, factor) -> np.ndarray:
    """A set whose sample mean and covariance are exactly these."""
    white = rng.normal(size=(num, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return white @ np.asarray(factor).T + mean


def test_a_set_with_itself_is_zero() -> None:
    rng = np.random.default_rng(0)
    x = gaussian(rng, 300, np.zeros(20), rng.normal(size=(20, 20)))
    assert 0 <= frechet_distance(x, x) < 1e-9
    assert 0 <= frechet_distance(x, x[::-1]) < 1e-9
    few = x[:5]  # singular covariances
    assert 0 <= frechet_distance(few, few) < 1e-6


def test_known_gaussian_pairs() -> None:
    rng = np.random.default_rng(1)
    zero = np.zeros(3)
    a = with_moments(rng, 50, zero, np.diag([1.0, 2.0, 3.0]))
    b = with_moments(rng, 80, zero + [3, 0, 4], np.diag([2.0, 2.0, 5.0]))
    # commuting: |m|^2 + sum of squared differences of the standard deviations
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 0 + 4, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(30, rel=1e-10)


def test_covariances_that_do_not_commute() -> None:
    """Against the closed form in two dimensions: tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB))."""
    rng = np.random.default_rng(2)
    f, g = np.array([[1.0, 0.0], [0.8, 0.5]]), np.array([[0.7, -0.6], [0.0, 1.3]])
    a, b = with_moments(rng, 40, np.zeros(2), f), with_moments(rng, 40, np.zeros(2), g)
    A, B = f @ f.T, g @ g.T
    root = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A @ B)))
    wanted = np.trace(A) + np.trace(B) - 2 * root
    assert not np.allclose(A @ B, B @ A)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-10)


def test_one_feature_and_too_few_samples() -> None:
    a = np.array([[0.0], [2.0]])
    assert frechet_distance(a, a + 3) == pytest.approx(9)
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(a[:1], a)


def test_floor_and_excess() -> None:
    rng = np.random.default_rng(3)
    real = rng.normal(size=(2000, 8))
    same = distance_and_floor(rng.normal(size=(500, 8)), real)
    assert same["size"] == 500 and same["floor"]["mean"] > 0
    assert abs(same["excess"]) < 4 * same["floor"]["std"]
    shifted = distance_and_floor(rng.normal(size=(500, 8)) + 0.5, real)
    assert shifted["excess"] == pytest.approx(8 * 0.25, rel=0.3)
    assert shifted["excess"] > 20 * shifted["floor"]["std"]
    few = distance_and_floor(rng.normal(size=(20, 8)), real)
    assert few["floor"]["mean"] > 5 * same["floor"]["mean"]  # the bias of few samples is on show
    assert distance_and_floor(rng.normal(size=(5000, 8)), real)["size"] == 1000


@pytest.fixture(scope="module")
def digits():
    return real_digits()


def as_pixels(ink: np.ndarray) -> np.ndarray:
    return np.round(ink * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)


def test_classifier_on_scans_it_has_not_seen(digits) -> None:
    assert len(digits.held_out) == 599
    assert digits.accuracy > 0.95
    predicted = digits.classifier.predict(digits.ink_NP[digits.held_out])
    assert np.mean(predicted == digits.labels_N[digits.held_out]) == digits.accuracy
    features = digits.features(digits.ink_NP)
    assert features.shape == (1797, NUM_FEATURES)
    np.testing.assert_allclose(np.cov(features.T), np.eye(NUM_FEATURES), atol=1e-9)


def test_real_scans_score_as_real(digits) -> None:
    held = digits.held_out
    report = score_digits(as_pixels(digits.ink_NP[held]), digits.labels_N[held])
    assert report["class_agreement"]["agreement"] > 0.95
    table = report["class_agreement"]["by_class"]
    assert sorted(table) == [str(c) for c in range(10)]
    assert sum(row["samples"] for row in table.values()) == 599
    assert min(row["agreement"] for row in table.values()) > 0.85
    frechet = report["frechet"]
    assert frechet["distance"] < frechet["floor"]["mean"]
    assert frechet["excess"] < 0  # these are not new scans but copies of the reference
    assert report["memorisation"]["copies"] == 1.0  # they are the scans
    assert report["classifier"]["held_out_accuracy"] > 0.95 and report["warnings"] == []
    json.dumps(report, allow_nan=False)


def test_wrong_labels_agree_by_chance(digits) -> None:
    labels = np.random.default_rng(0).permutation(digits.labels_N)
    report = score_digits(as_pixels(digits.ink_NP), labels)
    assert 0.06 < report["class_agreement"]["agreement"] < 0.14


def test_damage_is_seen(digits) -> None:
    """Noise, and missing classes, are each far above the floor's spread."""
    rng = np.random.default_rng(0)
    noisy = (digits.ink_NP + rng.normal(0, 2, digits.ink_NP.shape)).clip(0, 16)
    report = score_digits(as_pixels(noisy), digits.labels_N)
    assert report["frechet"]["excess"] > 5 * report["frechet"]["floor"]["std"]
    assert report["memorisation"]["copies"] < 0.5
    few_classes = digits.ink_NP[digits.labels_N < 6]
    report = score_digits(as_pixels(few_classes), None)
    assert report["class_agreement"] is None
    assert report["frechet"]["excess"] > 5 * report["frechet"]["floor"]["std"]
    assert sum(report["predicted_share"][str(c)] for c in range(6)) > 0.97


def test_memorisation_tells_copies_from_new_samples(digits) -> None:
    rng = np.random.default_rng(1)
    copies = memorisation(digits.ink_NP[:200], digits.ink_NP)
    assert copies["ratio"] < 1e-5 and copies["copies"] == 1.0
    order = rng.permutation(len(digits.ink_NP))
    new = memorisation(digits.ink_NP[order[:300]], digits.ink_NP[order[300:]])
    assert 0.8 < new["ratio"] < 1.25 and new["copies"] < 0.05


def test_few_samples_warn_with_numbers(digits) -> None:
    report = score_digits(as_pixels(digits.ink_NP[:20]), digits.labels_N[:20])
    assert len(report["warnings"]) == 1
    assert "20 samples" in report["warnings"][0] and "rank 19" in report["warnings"][0]
    with pytest.raises(ValueError, match="at least 2"):
        score_digits(as_pixels(digits.ink_NP[:1]), digits.labels_N[:1])


def folder_of_samples(path, pixels, labels) -> None:
    (path / "images").mkdir(parents=True)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture[..., 0]).save(path / "images" / f"{number:06d}.png")
    np.savez(path / "samples.npz", arr_0=pixels, labels=labels)
    write_json(path / "recipe.json", {"num": len(pixels), "sampler": "ddim", "steps": 50})


def test_score_of_a_folder_carries_its_recipe(tmp_path, digits) -> None:
    folder_of_samples(tmp_path / "s", as_pixels(digits.ink_NP[:100]), digits.labels_N[:100])
    report = score(tmp_path / "s", "digits")
    assert report["recipe"] == {"num": 100, "sampler": "ddim", "steps": 50}
    assert report["class_agreement"]["agreement"] > 0.95
    stored = json.loads((tmp_path / "s" / "score.json").read_text())
    assert report == stored | {"file": str(tmp_path / "s" / "score.json"), "remarks": []}
    assert len(report["reference"]["sha256"]) == 64
    score(tmp_path / "s", "digits", out=tmp_path / "other.json")
    assert (tmp_path / "other.json").exists() and not list(tmp_path.rglob("*.partial"))


def test_mistakes_are_named(tmp_path, digits) -> None:
    with pytest.raises(ValueError, match="holds no image"):
        score(tmp_path, "digits")
    with pytest.raises(ValueError, match="8 x 8 x 1"):
        score_digits(np.zeros((5, 16, 16, 3), dtype=np.uint8), None)
    with pytest.raises(ValueError, match="0 to 9"):
        score_digits(as_pixels(digits.ink_NP[:3]), np.array([0, 1, 10]))
    folder_of_samples(tmp_path / "s", as_pixels(digits.ink_NP[:3]), digits.labels_N[:3])
    (tmp_path / "s" / "images" / "000001.png").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 samples; run `sample` again"):
        score(tmp_path / "s", "digits")
    with pytest.raises(ValueError, match="nowhere is not there"):
        score(tmp_path / "nowhere", "digits")
