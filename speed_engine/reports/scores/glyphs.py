"""Drawn glyphs as a judge: is a sample what it was to be, how far is all from the true distribution, is it a copy.

The true distribution is at hand: real data are fresh draws, which no set holds. Their distance from each other is the
floor; how near fresh draws lie to the training draws says what a copy is.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from speed_engine.data import glyph_pictures
from speed_engine.data.glyphs import COUNT
from speed_engine.reports.scores import glyph_network
from speed_engine.reports.scores.digits import class_agreement, predicted_share
from speed_engine.reports.scores.frechet import frechet_distance, mean_and_spread

NUM_REAL = 6200  # fresh draws that samples are compared with: a hundred of each class
NUM_NEAREST = 1000  # samples, and fresh draws, whose nearest training draw is looked for
SHAPE = (32, 32, 3)
NUM_FLOORS = 5  # sets of fresh draws behind the floor
FIRST_OF_FLOORS = glyph_pictures.FRESH + 2**29
POOL = 8  # pixels of a side of the patches whose colour is a feature
BATCH = 500


@functools.cache
def _network() -> tuple[glyph_network.GlyphNetwork, str]:
    return glyph_network.load_network()


@functools.cache
def _real() -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 NHWC, labels) of the fresh draws."""
    pixels, labels = glyph_pictures.draw(0, glyph_pictures.FRESH, NUM_REAL)
    return pixels.transpose(0, 2, 3, 1), labels


@torch.no_grad()
def _seen(pixels_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features float64 [N, 144]: of the shape by the network, of the colours by 8 x 8 patches; classes [N])."""
    network, _ = _network()
    rows, classes = [], []
    for i in range(0, len(pixels_NHWC), BATCH):
        x = torch.from_numpy(np.ascontiguousarray(pixels_NHWC[i : i + BATCH].transpose(0, 3, 1, 2)))
        features = network.features(x)
        colours = torch.nn.functional.avg_pool2d(x.float() / 255, POOL).flatten(1)
        rows.append(torch.cat([features, colours], 1).double().numpy())
        classes.append(network.head(features).argmax(1).numpy())
    return np.concatenate(rows), np.concatenate(classes)


@functools.cache
def _space() -> tuple[np.ndarray, np.ndarray, float]:
    """(what features are divided by, the real ones, share of fresh draws whose class the network tells)."""
    pixels, labels = _real()
    rows, classes = _seen(pixels)
    unit = np.maximum(
        rows.std(0), 1e-3
    )  # a feature that is nearly always 0 does not become the loudest
    return unit, rows / unit, float((classes == labels).mean())


def both_features(pixels_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features of samples, of the fresh draws), in the space of `score_glyphs`."""
    unit, real, _ = _space()
    return _seen(pixels_NHWC)[0] / unit, real


def memorisation(pixels_NHWC: np.ndarray) -> dict[str, float]:
    """Distance of samples to the nearest training draw beside that of fresh draws, Euclidean, in units of a pixel's
    full range. `copies`: the share of samples that are nearer than 99 % of fresh draws are. The training draws are
    those of the default set: seed 0, the first 20,000.
    """
    train = np.concatenate(
        [glyph_pictures.draw(0, i, BATCH)[0].reshape(BATCH, -1) for i in range(0, COUNT, BATCH)]
    )
    order = np.random.default_rng(0).permutation(len(pixels_NHWC))[:NUM_NEAREST]
    samples = pixels_NHWC[np.sort(order)].transpose(0, 3, 1, 2).reshape(len(order), -1)
    fresh = _real()[0][:NUM_NEAREST].transpose(0, 3, 1, 2).reshape(NUM_NEAREST, -1)
    to_sample, to_fresh = (_nearest(each, train) for each in (samples, fresh))
    near = float(np.quantile(to_fresh, 0.01))
    return {
        "median_sample_to_real": float(np.median(to_sample)),
        "median_real_to_real": float(np.median(to_fresh)),
        "ratio": float(np.median(to_sample) / np.median(to_fresh)),
        "copies": float((to_sample < near).mean()),
        "copy_threshold": near,
    }


def _nearest(rows_NP: np.ndarray, train_MP: np.ndarray) -> np.ndarray:
    """The distance of every row to the nearest of the training draws; float64 [N]."""
    found = np.full(len(rows_NP), np.inf)
    rows = torch.from_numpy(rows_NP.astype(np.float32) / 255)
    for i in range(0, len(train_MP), 2000):
        part = torch.from_numpy(train_MP[i : i + 2000].astype(np.float32) / 255)
        found = np.minimum(found, torch.cdist(rows, part).amin(1).double().numpy())
    return found


def score_glyphs(pixels_NHWC: np.ndarray, labels_N: np.ndarray | None) -> dict[str, Any]:
    """The report on samples of glyphs: uint8 [N, 32, 32, 3]; labels 0 to 61 or None.

    Raises ValueError for other shapes or labels, or fewer than 2 samples.
    """
    return quick_report(pixels_NHWC, labels_N) | {"memorisation": memorisation(pixels_NHWC)}


def quick_report(pixels_NHWC: np.ndarray, labels_N: np.ndarray | None) -> dict[str, Any]:
    """`score_glyphs` without the search for copies, which takes ten seconds."""
    if pixels_NHWC.shape[1:] != SHAPE:
        raise ValueError(
            f"glyphs are 32 x 32 x 3 pixels, these samples are {pixels_NHWC.shape[1:]}; give another reference"
        )
    characters = glyph_pictures.CHARACTERS
    if labels_N is not None and not np.isin(labels_N, np.arange(len(characters))).all():
        raise ValueError("the labels of glyphs are 0 to 61; these samples have others")
    unit, real, accuracy = _space()
    rows, predicted = _seen(pixels_NHWC)
    warnings = []
    if len(rows) <= rows.shape[1]:
        warnings.append(
            f"{len(rows)} samples cannot fill {rows.shape[1]} dimensions: the covariance has rank {len(rows) - 1} at "
            "most and the Frechet distance says little; draw more samples"
        )
    return {
        "kind": "glyphs",
        "num_samples": len(rows),
        "class_agreement": None
        if labels_N is None
        else class_agreement(predicted, labels_N, characters),
        "predicted_share": predicted_share(predicted, characters),
        "frechet": _frechet(rows / unit, real),
        "classifier": {
            "kind": "GlyphNetwork",
            "sha256": _network()[1],
            "held_out": len(real),
            "held_out_accuracy": accuracy,
        },
        "feature_space": "96 features of the glyphs' classifier and 48 of colours, unit variance each",
        "reference": {
            "name": "fresh glyphs",
            "num": len(real),
            "sha256": glyph_pictures.atlas().sha256,
        },
        "warnings": warnings,
        "versions": {name: version(name) for name in ("matplotlib", "numpy", "torch")},
    }


def _frechet(rows: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """As `frechet.distance_and_floor` tells it, but the floor is of sets that are drawn for it: n samples, and n fresh
    draws in their place, are compared with the same real ones. Both have as many of each class, which a random part of
    the real ones would not.
    """
    unit, _, _ = _space()
    size = min(len(rows), len(real))
    rng = np.random.default_rng(0)
    floor, same_size = [], []
    for k in range(NUM_FLOORS):
        pixels, _ = glyph_pictures.draw(0, FIRST_OF_FLOORS + k * NUM_REAL, size)
        floor.append(frechet_distance(_seen(pixels.transpose(0, 2, 3, 1))[0] / unit, real))
        same_size.append(frechet_distance(rows[np.sort(rng.permutation(len(rows))[:size])], real))
    return {
        "distance": frechet_distance(rows, real),
        "same_size": mean_and_spread(same_size),
        "floor": mean_and_spread(floor),
        "excess": float(np.mean(same_size) - np.mean(floor)),
        "size": size,
        "splits": NUM_FLOORS,
    }
