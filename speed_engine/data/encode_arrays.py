"""`encode --arrays`: latents, videos or pixels that are arrays already, with what belongs to each sample, to shards.

    x           [N, C, *space]   uint8: pixels; float16 or float32: latents, stored as they are
    label       [N] integers     optional; class_names [classes] of texts beside it
    any other   [N, ...]         a named array a sample, a condition of that name

One .npz file, or a folder of .npy files with these names, which are read piece by piece. Everything is checked before
the first sample is written.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from speed_engine.data import DataError
from speed_engine.data.encode_set import ALONE, Job, Sample, Source, Team, write_set
from speed_engine.data.encode_set import size as byte_size
from speed_engine.data.storage import scaling
from speed_engine.data.storage.index import Index
from speed_engine.data.storage.npy import DTYPES, NAMED_DTYPES, name_fault
from speed_engine.data.storage.scaling import Scale
from speed_engine.data.storage.scan import MAX_LABEL
from speed_engine.data.storage.shard_writer import sample_bytes

OWN = ("x", "label", "class_names")  # what is not a named array
AT_A_TIME = 1 << 24  # bytes that are checked


def open_arrays(place: Path) -> dict[str, np.ndarray]:
    """The arrays of a file or a folder. Nothing is unpickled. Raises DataError naming what is wrong."""
    try:
        if place.is_dir():
            files = sorted(place.glob("*.npy"))
            return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in files}
        archive = np.load(place, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{place} is one array; put it into a folder as x.npy, and give that")
        with archive:
            found = {name: archive[name] for name in archive.files}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{place} cannot be read as arrays ({reason}); give an .npz file or a folder of .npy files"
        ) from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # any zip archive opens
            raise DataError(f"{place} is no .npz file: {name} in it is no array")
    return found


def encode_arrays(
    place: Path,
    out: Path,
    *,
    scale: Scale | None = None,
    shift: Scale | None = None,
    posterior: bool = False,
    vae: str | None = None,
    shard_size: int = 10_000,
    console: Console | None = None,
    team: Team = ALONE,
) -> Index | None:
    """Write the arrays as a set of shards into `out`; its index, on the first process.

    A set that is there already is left alone. scale, shift: x = (stored - shift) * scale is model space; of latents,
    which need a scale. posterior: x [N, 2C, *space] holds mean and standard deviation. vae: which autoencoder made the
    latents, a note. team: the processes that share the work. Raises DataError.
    """

    def prepare() -> Job:
        arrays = open_arrays(place)
        x, label, class_names = check(arrays, place)
        if x.dtype == np.uint8:
            if posterior or (scale, shift, vae) != (None, None, None):
                raise DataError(
                    "--scale, --shift, --posterior and --vae belong to latents, and x is uint8; leave them out"
                )
        else:
            channels = x.shape[1] // (1 + posterior)
            if posterior and x.shape[1] % 2:
                raise DataError(f"{place}: x has {x.shape[1]} channels, which are not two halves")
            scaling.check(scale, shift, channels)
        named = {name: array for name, array in sorted(arrays.items()) if name not in OWN}
        plan: dict[str, Any] = {
            "arrays": {name: digest(place, name, array) for name, array in sorted(arrays.items())},
            "scale": scale,
            "shift": shift,
            "posterior": posterior,
            "vae": vae,
            "shard_size": shard_size,
        }

        def items(numbers: range) -> Iterator[Sample]:
            for number in numbers:
                told = {name: np.asarray(array[number]) for name, array in named.items()}
                one = None if label is None else int(label[number])
                yield Sample(number, np.asarray(x[number]), one, arrays=told)

        each = [array.nbytes // len(x) for array in (x, *named.values())]
        one = sample_bytes(*each, label=label is not None)
        also = "".join(f", {name}" for name in ("label", *named) if name in arrays)
        said = (
            f"{len(x)} arrays {x.dtype} {' x '.join(map(str, x.shape[1:]))}{also}; "
            f"about {byte_size(len(x) * one)}"
        )
        source = Source(items, said, one, class_names, scale, shift, vae)
        return Job(plan, len(x), shard_size, lambda: source, posterior, "samples")

    return write_set(out, prepare, console=console, team=team)


def check(
    arrays: Mapping[str, np.ndarray], place: Path
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """(x, label, class names). Raises DataError for what cannot be stored."""
    x = arrays.get("x")
    if x is None:
        there = ", ".join(arrays) or "nothing"
        raise DataError(f"{place} has no array x, the samples; it holds {there}")
    if x.ndim < 3 or x.dtype.str not in DTYPES or not x.size:
        raise DataError(
            f"{place}: x is {x.dtype} {x.shape}; it must be uint8, float16 or float32 of the shape (N, C, ...)"
        )
    for name, array in arrays.items():
        if name in ("x", "class_names"):
            continue
        if not array.ndim or len(array) != len(x):
            raise DataError(
                f"{place}: {name} has the shape {array.shape}, and x has {len(x)} samples; give one for each"
            )
        if name == "label":
            continue
        if fault := name_fault(name):
            raise DataError(f"{place}: no array can be called so: {fault}")
        if array.dtype.str not in NAMED_DTYPES or not array.size:
            raise DataError(
                f"{place}: {name} is {array.dtype} {array.shape}; it must be one of "
                f"{', '.join(NAMED_DTYPES.values())} and not empty"
            )
    names = _class_names(arrays, place)
    return x, _label(arrays.get("label"), names, place), names


def _class_names(arrays: Mapping[str, np.ndarray], place: Path) -> list[str]:
    given = arrays.get("class_names")
    if given is None:
        return []
    if given.ndim != 1 or given.dtype.kind != "U" or not given.size or "label" not in arrays:
        raise DataError(
            f"{place}: class_names must be a row of texts, one a class, with a label beside it"
        )
    return [str(text) for text in given]


def _label(label: np.ndarray | None, names: list[str], place: Path) -> np.ndarray | None:
    if label is None:
        return None
    if label.ndim != 1 or label.dtype.kind not in "iu":
        raise DataError(f"{place}: label is {label.dtype} {label.shape}; it must be N integers")
    last = len(names) - 1 if names else MAX_LABEL
    wrong = np.flatnonzero((label < 0) | (label > last))
    if len(wrong):
        raise DataError(
            f"{place}, sample {wrong[0]}: the label {label[wrong[0]]} is not from 0 to {last}; correct "
            f"it{' or class_names' if names else ''}"
        )
    return label


def digest(place: Path, name: str, array: np.ndarray) -> str:
    """SHA-256 of shape, dtype and values: what an interrupted run is told again by.

    Raises DataError, naming the sample, for NaN and infinity.
    """
    found = hashlib.sha256(json.dumps([array.dtype.str, array.shape]).encode())
    rows = max(1, AT_A_TIME * len(array) // max(array.nbytes, 1))
    for begin in range(0, len(array), rows):
        part = np.ascontiguousarray(array[begin : begin + rows])
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            bad = int(np.argmin(np.isfinite(part).reshape(len(part), -1).all(1)))
            raise DataError(
                f"{place}, sample {begin + bad}: {name} holds NaN or infinity; correct it"
            )
        found.update(part.tobytes())
    return found.hexdigest()
