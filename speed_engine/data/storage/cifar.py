"""CIFAR-10 and CIFAR-100 as they are downloaded, the python and the binary version, packed or unpacked.

The python version is a pickle, which is a program. It is read by an unpickler that knows four names, each a stand-in of
our own that only keeps what it is given: nothing in the file is executed. Facts: cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .. import DataError
from .pictures import Listing, Picture

PIXELS = 3 * 32 * 32
MOST = 1 << 28  # bytes of one file; the largest there is has 155 million
TEN, HUNDRED = [f"data_batch_{number}" for number in range(1, 6)], ["train"]
KNOWN = {*TEN, *HUNDRED, "test_batch", "test", "batches.meta", "meta"}
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


def is_one(place: Path) -> bool:
    """Whether this is a packed archive, or a folder with the batches."""
    if place.is_file():
        return place.name.endswith((".tar.gz", ".tgz"))
    return any(
        (_inner(place) / name).is_file()
        for name in ("data_batch_1", "data_batch_1.bin", "train", "train.bin")
    )


def find(place: Path, labels: bool = True) -> Listing:
    """The training images in their order, 32 x 32 colour, with the (fine) classes. Raises DataError."""
    files = _packed(place) if place.is_file() else _unpacked(_inner(place))
    binary = any(name.endswith(".bin") for name in files)
    batches = [f"{name}.bin" if binary else name for name in TEN]
    hundred = not any(name in files for name in batches)
    batches = [f"{name}.bin" if binary else name for name in HUNDRED] if hundred else batches
    if missing := [name for name in batches if name not in files]:
        raise DataError(
            f"{place} is no whole CIFAR archive: {missing[0]} is missing; fetch it again"
        )
    read = _binary if binary else _pickled
    parts = [read(files[name], f"{place}, {name}", hundred) for name in batches]
    names = _names(files, place, hundred, binary)
    x = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    label = np.concatenate([each for _, each in parts])
    wrong = np.flatnonzero((label < 0) | (label >= len(names)))
    if len(wrong):
        raise DataError(
            f"{place}, image {wrong[0]}: the label {label[wrong[0]]} is none of {len(names)} classes"
        )
    order = [
        f"{name}/{i:05d}"
        for name, (_, each) in zip(batches, parts, strict=True)
        for i in range(len(each))
    ]
    where = {path: number for number, path in enumerate(order)}
    told = label.tolist() if labels else [None] * len(x)
    pictures = [Picture(path, PIXELS, each) for path, each in zip(order, told, strict=True)]
    remarks = (
        ["the test images are left out"] if any(name.startswith("test") for name in files) else []
    )

    def load(picture: Picture) -> np.ndarray:
        return np.ascontiguousarray(x[where[picture.path]].transpose(1, 2, 0))

    return Listing(pictures, names if labels else [], [], remarks, load)


def _inner(place: Path) -> Path:
    return next((place / name for name in FOLDERS if (place / name).is_dir()), place)


def _unpacked(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size <= MOST]
    return {path.name: path.read_bytes() for path in paths if _wanted(path.name)}


def _packed(place: Path) -> dict[str, bytes]:
    """The archive's files in memory; gzip's own sum tells of damage."""
    found = {}
    try:
        with tarfile.open(place, "r:gz") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isreg() and _wanted(name) and member.size <= MOST:
                    file = archive.extractfile(member)
                    found[name] = b"" if file is None else file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{place} cannot be unpacked ({error}); fetch it again") from None
    return found


def _wanted(name: str) -> bool:
    return (
        name in KNOWN
        or name.removesuffix(".bin") in KNOWN
        or name.endswith(("_names.txt", "meta.txt"))
    )


def _names(files: dict[str, bytes], place: Path, hundred: bool, binary: bool) -> list[str]:
    if binary:
        text = files.get("fine_label_names.txt" if hundred else "batches.meta.txt", b"")
        names = text.decode("ascii", "replace").split()
    else:
        meta = "meta" if hundred else "batches.meta"
        content = _load(files[meta], f"{place}, {meta}") if meta in files else {}
        names = content.get("fine_label_names" if hundred else "label_names", [])
    count = 100 if hundred else 10
    if not names:
        return [str(number) for number in range(count)]
    if not isinstance(names, list) or len(names) != count:
        raise DataError(f"{place} does not name {count} classes; fetch it again")
    return [_text(name) for name in names]


def _binary(content: bytes, where: str, hundred: bool) -> tuple[np.ndarray, np.ndarray]:
    width = PIXELS + 1 + hundred  # of CIFAR-100 the coarse class, then the fine one
    if not content or len(content) % width:
        raise DataError(f"{where} has {len(content)} bytes, no multiple of {width}; fetch it again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, width)
    return rows[:, 1 + hundred :], rows[:, int(hundred)].astype(np.int64)


def _pickled(content: bytes, where: str, hundred: bool) -> tuple[np.ndarray, np.ndarray]:
    found = _load(content, where)
    data, label = found.get("data"), found.get("fine_labels" if hundred else "labels")
    if not isinstance(data, _Array) or not isinstance(label, list):
        raise DataError(f"{where} is a pickle, but not CIFAR's: it has no data and labels")
    shape, raw = data.shape, data.raw
    if (
        shape != (len(label), PIXELS)
        or len(raw) != len(label) * PIXELS
        or {*map(type, label)} != {int}
    ):
        raise DataError(f"{where} is a pickle, but not CIFAR's: its data has the shape {shape}")
    order = "F" if data.fortran else "C"
    return np.frombuffer(raw, np.uint8).reshape(shape, order=order), np.array(label, np.int64)


# -------------------------------------------------------------------------------------------- the pickle


class _Kept:
    """Takes anything and does nothing."""

    def __new__(cls, *_: Any) -> _Kept:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        del state


class _Array(_Kept):
    """An array of bytes: its shape and what lies in it."""

    shape: tuple[int, ...] = ()
    fortran = False
    raw = b""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5 and isinstance(state[4], bytes):
            self.shape, self.fortran, self.raw = tuple(state[1]), bool(state[3]), state[4]


def _latin(text: Any, *_: Any) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    return text.encode("latin-1")


KNOWN_NAMES = {
    **dict.fromkeys(
        [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")], _Array
    ),
    "numpy.ndarray": _Kept,
    "numpy.dtype": _Kept,
    "_codecs.encode": _latin,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = KNOWN_NAMES.get(f"{module}.{name}")
        return _refuse(f"{module}.{name}") if known is None else known

    def persistent_load(self, pid: Any) -> NoReturn:
        _refuse(f"a stored object {str(pid)[:40]}")


def _refuse(name: str) -> NoReturn:
    raise pickle.UnpicklingError(f"it names {name}")


def _load(content: bytes, where: str) -> dict[str, Any]:
    """A dictionary; its keys as text. Raises DataError for every other pickle, and executes none."""
    try:
        found = _Reader(io.BytesIO(content), encoding="bytes").load()
        if isinstance(found, dict):
            return {_text(key): value for key, value in found.items()}
        reason = f"it holds a {type(found).__name__}"
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:120]
    raise DataError(
        f"{where} is not CIFAR's pickle ({reason}), and nothing in it was run; fetch it again"
    )


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
