"""`encode --arrays`: latents, videos or pixels that are arrays already, with what belongs to each sample, to shards.

    x           [N, C, *space]   uint8: pixels; float16 or float32: latents, stored as they are
    label       [N] integers     optional; class_names [classes] of texts beside it in an .npz
    any other   [N, ...]         a named array a sample, a condition of that name

One .npz file, or a folder of .npy files with these names, which are read piece by piece.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.data import DataError
from speed_engine.data.storage.index import Index
from speed_engine.data.storage.npy import NAMED_DTYPES
from speed_engine.data.storage.scaling import Scale
from speed_engine.data.storage.writer import SetWriter

RESERVED = ("x", "label", "class_names")
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")


def open_arrays(place: Path) -> dict[str, np.ndarray]:
    """The arrays of a file or a folder. Nothing is unpickled. Raises DataError naming what is wrong."""
    try:
        if place.is_dir():
            files = sorted(place.glob("*.npy"))
            found = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in files}
        else:
            with np.load(place, allow_pickle=False) as file:
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise DataError(f"{place} is one array; put it into a folder as x.npy")
                found = {name: file[name] for name in file.files}
    except DataError:
        raise
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{place} cannot be read as arrays ({reason}); give an .npz file or a folder of .npy files"
        ) from None
    return found


def encode_arrays(
    place: Path,
    out: Path,
    *,
    scale: Scale | None = None,
    shift: Scale | None = None,
    shard_size: int | None = None,
) -> Index:
    """Write the arrays as a set of shards into `out`; its index. A set that is there already is left alone.

    scale, shift: x = (stored - shift) * scale is model space; of latents, which need a scale. Raises DataError.
    """
    arrays = open_arrays(place)
    names = check(arrays, place)
    pixels = arrays["x"].dtype == np.uint8
    if pixels and (scale is not None or shift is not None):
        raise DataError("--scale and --shift belong to latents, and x is uint8; leave them out")
    if not pixels and scale is None:
        raise DataError(
            "the scale of latents is needed: give --scale (0.18215 for Stable Diffusion's VAE, 1 for "
            "latents that are scaled already, auto to measure it)"
        )
    plan: dict[str, Any] = {
        "arrays": {name: digest(array) for name, array in sorted(arrays.items())},
        "scale": scale,
        "shift": shift,
        "shard_size": shard_size,
    }
    label, classes = arrays.get("label"), arrays.get("class_names", np.empty(0, str))
    with SetWriter(out, plan, shard_size=shard_size or 10_000) as writer:
        if writer.finished is not None:
            return writer.finished
        for number in range(writer.position, len(arrays["x"])):
            writer.write(
                number + 1,
                np.asarray(arrays["x"][number]),
                None if label is None else int(label[number]),
                arrays={name: np.asarray(arrays[name][number]) for name in names},
            )
        texts = [str(text) for text in classes]
        return writer.finish(texts, scale, shift) if not pixels else writer.finish(texts)


def check(arrays: Mapping[str, np.ndarray], place: Path) -> list[str]:
    """The names of the arrays beside x and label. Raises DataError for what cannot be stored."""
    x = arrays.get("x")
    if x is None:
        there = ", ".join(arrays) or "nothing"
        raise DataError(f"{place} has no array x, the samples; it holds {there}")
    if x.ndim < 3 or str(x.dtype) not in ("uint8", "float16", "float32") or not x.size:
        raise DataError(
            f"{place}: x is {x.dtype} {x.shape}; it must be uint8, float16 or float32 of the shape (N, C, ...)"
        )
    label = arrays.get("label")
    if label is not None and (label.ndim != 1 or label.dtype.kind not in "iu"):
        raise DataError(f"{place}: label is {label.dtype} {label.shape}; it must be N integers")
    names = [name for name in arrays if name not in RESERVED]
    for name in [*names, *(["label"] if label is not None else [])]:
        array = arrays[name]
        if not array.ndim or len(array) != len(x):
            raise DataError(
                f"{place}: {name} has the shape {array.shape}, and x has {len(x)} samples; give one for each"
            )
    for name in names:
        if not NAME.fullmatch(name) or name in ("npy", "cls", "flipped"):
            raise DataError(
                f"{place}: {name!r} cannot be an array's name; use small letters, digits and _"
            )
        if arrays[name].dtype.str not in NAMED_DTYPES:
            raise DataError(
                f"{place}: {name} is {arrays[name].dtype}; it must be one of {', '.join(NAMED_DTYPES.values())}"
            )
    return names


def digest(array: np.ndarray) -> str:
    """SHA-256 of shape, dtype and values: what an interrupted run is told again by."""
    found = hashlib.sha256(json.dumps([array.dtype.str, array.shape]).encode())
    for begin in range(0, len(array) if array.ndim else 0, 4096):
        found.update(np.ascontiguousarray(array[begin : begin + 4096]).tobytes())
    return found.hexdigest()
