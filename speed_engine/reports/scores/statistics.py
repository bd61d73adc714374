"""A reference as one file: mean, covariance and features of its pictures in one space, so that it is looked at once.

    mean, covariance    float64 [F], [F, F]
    features            float32 [N, F]; what density, coverage and the kernel distance need
    told                JSON: the space, the number of pictures, their hash and how they were scaled

Files of others with `mu` and `sigma` alone are read, too; they do not say which network made them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.atomic_files import atomic
from speed_engine.reports.scores import frechet
from speed_engine.reports.scores.features import Features, Space
from speed_engine.reports.scores.sets import Pictures

FORMAT = 1


@dataclass(frozen=True)
class Reference:
    """features: None where only the moments are known. told: what a report says of it."""

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None
    told: dict[str, Any]
    remarks: list[str] = field(default_factory=list)


def of_features(found: Features, pictures: Pictures, space: Space) -> Reference:
    """The reference that pictures are."""
    told = {
        "name": pictures.name,
        **pictures.told,
        "num": pictures.num,
        "sha256": found.sha256,
        "size": pictures.size,
        "space": space.identity,
    }
    return Reference(*frechet.moments(found.rows), found.rows, told)


def is_one(place: str | Path) -> bool:
    """Whether a file holds statistics and no pictures. Raises ValueError for a file that is no npz."""
    path = Path(place)
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no sound .npz ({' '.join(str(error).split())[:120]})"
        ) from error
    return {"mean", "covariance"} <= names or ({"mu", "sigma"} <= names and "arr_0" not in names)


def save(path: Path, reference: Reference) -> None:
    """Whole or not at all."""
    arrays: dict[str, Any] = {
        "mean": reference.mean,
        "covariance": reference.covariance,
        "told": np.array(json.dumps({"format": FORMAT, **reference.told})),
    }
    if reference.features is not None:
        arrays["features"] = reference.features.astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load(path: Path, space: Space, size: int) -> Reference:
    """size: of the samples. Raises ValueError for statistics of another space, or of pictures of another size."""
    with np.load(path, allow_pickle=False) as arrays:
        ours = "told" in arrays
        names = ("mean", "covariance") if ours else ("mu", "sigma")
        mean, covariance = (arrays[name].astype(np.float64) for name in names)
        features = arrays.get("features")
        told = json.loads(str(arrays["told"])) if ours else {}
    num = mean.size
    if mean.ndim != 1 or covariance.shape != (num, num) or not np.isfinite(covariance).all():
        raise ValueError(
            f"{path} holds {names[0]} {mean.shape} and {names[1]} {covariance.shape}, which do not fit"
        )
    if not ours:
        remark = f"{path.name} does not say which network made it; taken as of the space that is asked for"
        space_told = dict(space.identity)
        return Reference(
            mean,
            covariance,
            None,
            {"name": path.name, "kind": "moments", "space": space_told},
            [remark],
        )
    if told.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is of another format than this version reads; store it anew")
    if told["space"] != space.identity:
        keys = [
            k
            for k in {**told["space"], **space.identity}
            if told["space"].get(k) != space.identity.get(k)
        ]
        there = ", ".join(f"{k} {told['space'].get(k)} (now {space.identity.get(k)})" for k in keys)
        raise ValueError(
            f"{path} is of another feature space: {there}; give the --features it was stored with"
        )
    if told["size"] != size:
        raise ValueError(
            f"{path} is of pictures of {told['size']}x{told['size']}, and these are {size}x{size}; give --resize "
            f"{told['size']}, or store it anew"
        )
    return Reference(mean, covariance, features, told)
