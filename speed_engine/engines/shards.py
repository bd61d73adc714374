"""The state of training in files that fit any number of processes, any ZeRO stage and both engines.

    state/shard-00000.safetensors     one file a process that writes
        weights/NAME                  float32 [n]: elements start .. start + n of the trained parameter NAME, row by row
        exp_avg/NAME, ema/NAME ...    the same elements of what the optimizer keeps of it
        frozen/NAME                   whole, in the first file: what is not trained
    its metadata, JSON under `layout`: {"format": 1, "files": N, "pieces": {NAME: {"start", "shape", "counts"}},
                                        "engine": {...}}

An engine tells by `Part`s which elements it keeps where; whoever loads reads the elements that its own parts need, from
whichever files hold them. Nothing is computed on the way, so every element arrives bit for bit. No file is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from speed_kernels.adamw_ema.optimizer import EMA_KEYS
from torch import Tensor

FORMAT = 1
LAYOUT = "layout"
WEIGHTS = "weights"


@dataclass(frozen=True)
class Part:
    """Elements `start .. start + numel` of a trained parameter, flattened row by row, and where one process keeps them.

    holder: the tensor that the optimizer updates, in float32; the elements begin at its element `offset`. One whose
    memory is in another order than its rows holds its parameter whole.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    holder: Tensor
    offset: int


def file_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def are_in(folder: Path) -> bool:
    """Whether the state in a folder is of this kind; earlier versions kept the engines' own files."""
    return (folder / file_name(0)).exists()


def collected(
    parts: Iterable[Part],
    optimizer: torch.optim.Optimizer,
    *,
    index: int,
    files: int,
    frozen: Mapping[str, Tensor],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """What process `index` of `files` that write is to write: {file name: {"tensors", "metadata"}}, see `write`.

    The tensors are the living ones. frozen: given on the first. counts: the engine's own, which `Shards.counts` gives
    back.
    """
    tensors = {f"frozen/{name}": tensor for name, tensor in frozen.items()}
    pieces: dict[str, Any] = {}
    numbers: dict[int, float] = {}  # counters that many parameters share are read once
    for part in parts:
        state = optimizer.state.get(part.holder) or {}
        kept = {key: value for key, value in state.items() if _is_like(value, part.holder, key)}
        for key, tensor in {WEIGHTS: part.holder, **kept}.items():
            elements = tensor.detach().reshape(-1)[part.offset : part.offset + part.numel]
            tensors[f"{key}/{part.name}"] = elements
        told = {key: _number(state[key], numbers) for key in state if key not in kept}
        pieces[part.name] = {"start": part.start, "shape": list(part.shape), "counts": told}
    layout = {"format": FORMAT, "files": files, "pieces": pieces, "engine": dict(counts)}
    return {file_name(index): {"tensors": tensors, "metadata": {LAYOUT: json.dumps(layout)}}}


def write(value: Mapping[str, Any], path: Path) -> None:
    """Write one value of `collected`. Raises OSError."""
    try:
        save_file(dict(value["tensors"]), path, dict(value["metadata"]))
    except SafetensorError as error:
        raise OSError(f"cannot write the state into {path.parent}: {error}") from error


def _is_like(value: Any, holder: Tensor, key: str) -> bool:
    return isinstance(value, Tensor) and value.shape == holder.shape and key != "step"


def _number(value: Any, known: dict[int, float]) -> int | float:
    """A counter for JSON: a float was a float32 tensor, an int a number."""
    if not isinstance(value, Tensor):
        return int(value)
    if id(value) not in known:
        known[id(value)] = float(value)
    return known[id(value)]


class Shards:
    """The files of a folder, open; leave them by `with`. Raises ValueError where they are not a whole state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, int] = {}
        self.pieces: dict[str, list[tuple[int, Any, dict[str, Any]]]] = {}
        self.frozen: dict[str, Tensor] = {}
        self._open = contextlib.ExitStack()
        self._names: dict[int, set[str]] = {}
        try:
            self._read_layouts()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            self._open.close()
            raise ValueError(f"the state in {folder} cannot be read: {error}") from error

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _read_layouts(self) -> None:
        paths = sorted(self.folder.glob("shard-*.safetensors"))
        for path in paths:
            file: Any = self._open.enter_context(safe_open(path, framework="pt"))
            layout = json.loads(file.metadata()[LAYOUT])
            if layout["format"] != FORMAT:
                raise ValueError(
                    f"{path.name} has the format {layout['format']}, and this version knows {FORMAT}"
                )
            if layout["files"] != len(paths):
                raise ValueError(f"it has {len(paths)} of {layout['files']} files")
            self._names[id(file)] = names = set(file.keys())
            for name, piece in layout["pieces"].items():
                self.pieces.setdefault(name, []).append((piece["start"], file, piece))
            for key in names:
                if key.startswith("frozen/"):
                    self.frozen[key.removeprefix("frozen/")] = file.get_tensor(key)
            if path == paths[0]:
                self.counts = layout["engine"]

    def keys(self, name: str) -> set[str]:
        """What there is of a parameter: `weights`, and the optimizer's tensors by their keys."""
        found = {key for _, file, _ in self.pieces.get(name, ()) for key in self._names[id(file)]}
        return {key.removesuffix(f"/{name}") for key in found if key.endswith(f"/{name}")}

    def counters(self, name: str) -> dict[str, int | float]:
        """The optimizer's counters of a parameter; empty before its first update."""
        return max((piece["counts"] for _, _, piece in self.pieces[name]), key=len)

    def read(self, key: str, part: Part) -> Tensor:
        """float32 [part.numel] on the host. Raises ValueError where the files hold not all of these elements."""
        if part.name not in self.pieces:
            raise ValueError(
                f"the state in {self.folder} holds no parameter {part.name}: it is of another network"
            )
        result = torch.empty(part.numel)
        found, end = 0, part.start + part.numel
        for start, file, piece in self.pieces[part.name]:
            if list(part.shape) != piece["shape"]:
                raise ValueError(
                    f"the state in {self.folder} holds {part.name} as {piece['shape']}, but the network has "
                    f"{list(part.shape)}"
                )
            stored = file.get_slice(f"{key}/{part.name}")
            low, high = max(start, part.start), min(start + stored.get_shape()[0], end)
            if low < high:
                result[low - part.start : high - part.start] = stored[low - start : high - start]
                found += high - low
        if found != part.numel:
            raise ValueError(
                f"the state in {self.folder} lacks {part.numel - found} elements of {part.name}"
            )
        return result


@torch.no_grad()
def restore(parts: Iterable[Part], optimizer: torch.optim.Optimizer, shards: Shards) -> None:
    """Give the holders their weights, and `optimizer` its state of them, bit for bit as they were collected.

    What a holder has beside its parts (padding) stays as it is in the weights and is zero in the state. Raises
    ValueError where a holder of several parameters would need several counts of updates.
    """
    by_holder: dict[Tensor, list[Part]] = {}
    for part in parts:
        by_holder.setdefault(part.holder, []).append(part)
    for holder, theirs in by_holder.items():
        for part in theirs:
            _put(holder, part, shards.read(WEIGHTS, part))
        state: dict[str, Any] = {}
        for key in sorted(set().union(*(shards.keys(part.name) for part in theirs)) - {WEIGHTS}):
            state[key] = torch.zeros_like(holder)
            for part in theirs:
                if key in shards.keys(part.name):
                    _put(state[key], part, shards.read(key, part))
                elif key in EMA_KEYS:  # of a parameter that was never updated
                    _put(state[key], part, shards.read(WEIGHTS, part))
        for key, count in _counters_of(theirs, shards).items():
            is_tensor = isinstance(count, float)
            state[key] = torch.tensor(count, device=holder.device) if is_tensor else count
        optimizer.state.pop(holder, None)
        if state:
            optimizer.state[holder] = state


def _counters_of(parts: list[Part], shards: Shards) -> dict[str, int | float]:
    """The one set of counters of a holder's parts."""
    found = {part.name: told for part in parts if (told := shards.counters(part.name))}
    first = next(iter(found), "")
    for name, told in found.items():
        if told != found[first]:
            raise ValueError(
                f"{first} has had other updates than {name} ({found[first]}, {told}), and this engine keeps one count "
                "for both; go on with engine.kind=torch, or with engine.zero=0"
            )
    return found.get(first, {})


def _put(tensor: Tensor, part: Part, values: Tensor) -> None:
    if tensor.is_contiguous():
        tensor.view(-1)[part.offset : part.offset + part.numel].copy_(values)
    else:
        assert part.numel == tensor.numel() == math.prod(part.shape)
        tensor.copy_(values.view(part.shape))
