"""How good samples are: distances of their distribution from a reference's, on any feature space, with their recipe.

`score` judges pictures of any place (see sets.py) against those of another, or against stored statistics: Frechet
distance, kernel distance, precision, recall, density and coverage in one space of features (see features.py). Against
the digits and the glyphs a small classifier says besides whether a sample is what it was asked to be, and whether it is
a copy. Every report says how it was measured (`measured`), and reports that were measured otherwise are not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speed_engine.atomic_files import write_json
from speed_engine.reports.scores import digits, features, frechet, glyphs, sets, statistics
from speed_engine.reports.scores.kernel import kernel_distance
from speed_engine.reports.scores.lines import headline
from speed_engine.reports.scores.nearest import neighbours

__all__ = ["Options", "headline", "judge_of", "score"]
# Sets that are on every machine, with a classifier of their own: name -> (report, the same in a hurry, features).
JUDGES = {
    "digits": (digits.score_digits, digits.score_digits, digits.both_features),
    "glyphs": (glyphs.score_glyphs, glyphs.quick_report, glyphs.both_features),
}
MOST_FEATURES_FOR_FLOOR = 256  # of more, the twenty distances of the floor take minutes


@dataclass(frozen=True)
class Options:
    """features: pixels, inception, or a TorchScript file; None = the digits' own against the digits, else inception.
    given, trusted: of that file (see `features.NetworkSpace`). weights: a local copy of Inception's. resize: to which
    the pictures of both sets are scaled. vae: decodes encoded latents. store: where the reference is kept as
    statistics. seed: of the subsets.
    """

    features: str | None = None
    given: features.Input = "bytes"
    trusted: bool = False
    weights: Path | None = None
    resize: int | None = None
    vae: str | None = None
    store: Path | None = None
    seed: int = 0
    batch_size: int = 64
    device: torch.device | str = "cpu"


def score(
    samples: str | Path,
    reference: str | Path,
    out: Path | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Judge `samples` against `reference` and write the report as JSON to `out`.

    out: default score.json in a folder that `sample` wrote, else score-NAME.json here. Returns the report, with the
    file's name under `file` and sentences for people under `remarks`; neither is in the file. Raises ValueError for
    what is no set of pictures, a missing package, and sets that do not fit each other.
    """
    options = options or Options()
    pictures = sets.open_pictures(
        samples, size=options.resize, vae=options.vae, device=options.device
    )
    remarks = list(pictures.remarks)
    if str(reference) in JUDGES and options.features is None:
        report = _by_its_judge(str(reference), pictures, options)
    else:
        report, said = _against(pictures, reference, options)
        remarks += said
    report |= {"samples": str(samples), "recipe": pictures.told.get("recipe")}
    if out is None:
        own = pictures.told.get("kind") == "samples"
        out = Path(samples) / "score.json" if own else Path(f"score-{Path(samples).stem}.json")
    write_json(out, report)
    return {**report, "file": str(out), "remarks": remarks}


def judge_of(data_kind: str) -> Callable[[np.ndarray, np.ndarray | None], dict[str, float]] | None:
    """What scores a few pictures while training runs on data of this kind; None where they have no score of their own.

    It takes pixels uint8 NHWC and labels, and returns the headline numbers of `score`.
    """
    if data_kind not in JUDGES:
        return None
    _, report_on, _ = JUDGES[data_kind]

    def judge(pixels_NHWC: np.ndarray, labels_N: np.ndarray | None) -> dict[str, float]:
        report = report_on(pixels_NHWC, labels_N)
        agreement, distance = report["class_agreement"], report["frechet"]["same_size"]["mean"]
        told = {} if agreement is None else {"class_agreement": agreement["agreement"]}
        return told | {"frechet_distance": distance}

    return judge


def _by_its_judge(name: str, pictures: sets.Pictures, options: Options) -> dict[str, Any]:
    report_on, _, both_features = JUDGES[name]
    for option, given in (("--store", options.store), ("--weights", options.weights)):
        if given is not None:
            raise ValueError(
                f"the {name}' own score has no use for {option}; leave it out, or give --features"
            )
    report = report_on(pictures.all(), pictures.labels)
    rows, real = both_features(pictures.all())
    more, warnings = _measures(rows, real, options.seed, options.device)
    report["warnings"] += warnings
    space = {"kind": name, "features": report["feature_space"]}
    if name == "glyphs":
        space["network"] = report["classifier"]["sha256"]
    return (
        report | more | {"measured": _measured(space, pictures, report["reference"], more, options)}
    )


def _against(
    pictures: sets.Pictures, place: str | Path, options: Options
) -> tuple[dict[str, Any], list[str]]:
    """The report in a space of features, and what there is to say of the reference."""
    stored, real = statistics.is_one(place), None
    if stored and options.store is not None:
        raise ValueError(f"{place} is stored already; leave out --store")
    if not stored:
        real = sets.open_pictures(
            place,
            size=options.resize or pictures.size,
            channels=pictures.channels,
            vae=options.vae,
            device=options.device,
            option="--reference",
        )
    space = features.open_space(
        options.features or "inception",
        given=options.given,
        trusted=options.trusted,
        weights=options.weights,
        device=options.device,
    )
    if real is None:
        reference = statistics.load(Path(place), space, pictures.size)
        remarks = list(reference.remarks)
    else:
        of_real = features.extract(space, real, options.batch_size)
        reference, remarks = statistics.of_features(of_real, real, space), list(real.remarks)
    if options.store is not None:
        statistics.save(options.store, reference)
        remarks.append(f"the reference is kept in {options.store}: give it as --reference")
    found = features.extract(space, pictures, options.batch_size)
    num, width = found.rows.shape
    if width != reference.mean.size:
        raise ValueError(
            f"{place} holds statistics of {reference.mean.size} features, and this space has {width}; give the "
            "--features that they are of"
        )
    warnings = []
    smallest = min(num, reference.told.get("num") or num)
    if smallest <= width:
        warnings.append(
            f"{smallest} pictures cannot fill {width} features: the covariance has rank {smallest - 1} at most, and "
            "the Frechet distance is biased upwards and not comparable with one of other numbers"
        )
    report: dict[str, Any] = {
        "kind": "features",
        "num_samples": num,
        "frechet": _frechet(found.rows, reference),
        "feature_space": _in_words(space.identity),
        "reference": reference.told,
        "of_samples": found.more,
    }
    more: dict[str, Any] = {}
    if reference.features is not None:
        more, told = _measures(found.rows, reference.features, options.seed, options.device)
        warnings += told
    else:
        warnings.append(
            "the reference's features are not stored: only the Frechet distance can be told"
        )
    measured = _measured(space.identity, pictures, reference.told, more, options)
    return report | more | {"warnings": warnings, "measured": measured}, remarks


def _frechet(rows: np.ndarray, reference: statistics.Reference) -> dict[str, Any]:
    real = reference.features
    if (
        real is not None
        and rows.shape[1] <= MOST_FEATURES_FOR_FLOOR
        and min(len(real) // 2, len(rows)) > 1
    ):
        return frechet.distance_and_floor(rows, real)
    moments = frechet.moments(rows)
    return {"distance": frechet.of_moments(*moments, reference.mean, reference.covariance)}


def _measures(
    rows: np.ndarray, real: np.ndarray, seed: int, device: torch.device | str
) -> tuple[dict[str, Any], list[str]]:
    """(what needs the features of both sets, why something could not be told)."""
    found: dict[str, Any] = {"neighbours": None, "kernel": None}
    warnings = []
    for name, measure in (
        ("neighbours", lambda: neighbours(rows, real, seed=seed, device=device)),
        ("kernel", lambda: kernel_distance(rows, real, seed=seed)),
    ):
        try:
            found[name] = measure()
        except ValueError as error:  # too few samples for this one
            warnings.append(str(error))
    return found, warnings


def _measured(
    space: dict[str, Any],
    pictures: sets.Pictures,
    reference: dict[str, Any],
    more: dict[str, Any],
    options: Options,
) -> dict[str, Any]:
    """What must agree where two scores are compared."""
    near, kernel = more.get("neighbours") or {}, more.get("kernel") or {}
    return {
        "space": space,
        "size": pictures.size,
        "resize": options.resize,
        "samples": pictures.num,
        "reference": {key: reference.get(key) for key in ("num", "sha256")},
        "k": near.get("k"),
        "neighbours_of": near.get("size"),
        "kernel_subsets": [kernel.get("subsets"), kernel.get("size")],
        "seed": options.seed,
    }


def _in_words(identity: dict[str, Any]) -> str:
    if identity["kind"] == "network":
        return f"{identity['file']} ({identity['sha256'][:8]}, given {identity['input']})"
    return str(identity.get("extractor", identity["kind"]))
