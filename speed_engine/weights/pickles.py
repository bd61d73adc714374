"""Checkpoints of torch, read as data: nothing in them is executed, and none takes far more memory than the file.

A pickle is a program. torch's weights-only reader runs none of it but the making of tensors and plain values; what
training scripts like to store beside the weights (arguments, paths, numpy's numbers) is read as a blank stand-in.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Which = Literal["auto", "ema", "model"]
# Under which key a training script stores the weights; `state_dict` is Lightning's word.
PLACES = {"ema": ("ema",), "model": ("model", "state_dict"), "auto": ("ema", "model", "state_dict")}


class _Blank:
    """Stands where a file holds a value that nobody needs; knows nothing, does nothing."""

    def __new__(cls, *_: Any) -> _Blank:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        del state


NUMBERS = ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool")
BLANKS = [
    *(f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath", "Path")),
    *(f"pathlib._local.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath", "Path")),
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(f"numpy.dtypes.{number}DType" for number in NUMBERS),
]


def read_pt(path: Path | str, which: Which = "auto") -> dict[str, Tensor]:
    """The weights of a torch checkpoint, without the prefixes of DDP and torch.compile.

    Layouts: the tensors themselves, or a dictionary with them under `ema`, and under `model` or
    `state_dict` (`auto` takes the EMA where there is one). Raises ValueError, naming the file: one
    that is damaged, holds objects other than tensors and plain values, has no weights where
    expected, or has tensors that claim far more memory than the file takes on disk.
    """
    content = _content(Path(path))
    if isinstance(content, Mapping):
        places = [content[key] for key in PLACES[which] if content.get(key) is not None]
        weights = places[0] if places else content
        if isinstance(weights, Mapping) and all(isinstance(t, Tensor) for t in weights.values()):
            _refuse_what_is_not_stored(weights, Path(path))
            return {_plain(key): tensor.detach() for key, tensor in weights.items()}
    keys = f"the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else ""
    raise ValueError(
        f"{path} has no weights where expected; it has {keys or type(content).__name__}"
    )


def _content(path: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _refuse_compressed(path)
        else:
            _refuse_what_no_pickle_begins_with(path)
        blanks = [(_Blank, name) for name in BLANKS]
        # DiT's own training script stores its arguments, a Namespace: a plain bag of values.
        with torch.serialization.safe_globals([argparse.Namespace, *blanks]):
            # mmap: a storage is a part of the file, and cannot be larger.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} was not loaded, because it holds more than tensors: {reason}"
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # what the reader stumbles over in a damaged file can be anything
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a sound torch checkpoint: {text}") from error


def _refuse_what_no_pickle_begins_with(path: Path) -> None:
    """A download that failed is mostly a page of text, or nothing."""
    with path.open("rb") as file:
        head = file.read(40)
    if head[:1] != pickle.PROTO:
        raise ValueError(f"it begins with {head!r}" if head else "it is empty")


def _refuse_compressed(path: Path) -> None:
    """torch.save never compresses; a file that is compressed can unfold to any size."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its part {entry.filename} is compressed")


def _refuse_what_is_not_stored(weights: Mapping[Any, Tensor], path: Path) -> None:
    """The numbers of the tensors must be in the file: no strides of zero, no storage used many times."""
    for key, tensor in weights.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{path} has weights that are not plain tensors: {key}")
    # Four times: a network may use a tensor of its file in several places.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    stored = path.stat().st_size
    if claimed > 4 * stored:
        raise ValueError(
            f"{path} has weights that claim {claimed} bytes, and the file has only {stored}"
        )


def _plain(key: Any) -> str:
    """A parameter's name as the bare model has it."""
    return re.sub(r"^(module\.)+", "", str(key).replace("_orig_mod.", ""))
