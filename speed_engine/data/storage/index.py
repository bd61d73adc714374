"""`index.json`: what a set of shards holds, and the checks that it still holds exactly that.

The index carries sizes, SHA-256 sums and a fingerprint over all of itself; the small `.idx.npy`
files carry the place and the CRC32 of every sample. Opening a set costs little (sizes and the small
files); `verify` reads every byte. `reindex` writes both from plain WebDataset tars, also from those
of somebody else, and only when asked to.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from speed_engine.atomic_files import write_bytes, write_json

from .. import DataError
from ..space import Space
from .npy import PREFIX, NamedArray, misfit
from .scaling import Numbers, Scale, constants
from .scan import Scanned, Shard, entries_path, entry_dtype, scan

INDEX = "index.json"
REINDEX = "python -m speed_engine encode --reindex DIR"


class StoredCondition(BaseModel):
    """A condition that several named arrays belong to; see `data.ConditionFacts`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    arrays: list[str]
    details: dict[str, Any] = {}


class Index(BaseModel):
    """The whole `index.json`. x = (stored - shift) * scale is model space; mean and std are
    measured there, per channel.

    shape: (C, *space) in model space; stored arrays have twice the channels when `posterior` (mean,
    standard deviation). vae: which autoencoder made the latents, where somebody said.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["speed-engine shards"] = "speed-engine shards"
    version: Literal[1, 2] = 1  # 2: has what 1 does not know: see `compose`
    kind: Literal["pixels", "latents"]
    count: int
    shape: tuple[int, ...]
    dtype: Literal["uint8", "float16", "float32"]
    posterior: bool
    flipped: bool
    scale: Numbers
    shift: Numbers
    num_classes: int
    class_names: list[str]
    mean: list[float]
    std: list[float]
    shards: list[Shard]
    arrays: dict[str, NamedArray] = {}
    vae: str | None = None
    conditions: dict[str, StoredCondition] = {}
    fingerprint: str = ""

    def sealed(self) -> Index:
        """The same index with its fingerprint: SHA-256 over everything else."""
        text = json.dumps(self.content(), sort_keys=True)
        return self.model_copy(update={"fingerprint": hashlib.sha256(text.encode()).hexdigest()})

    def content(self) -> dict[str, Any]:
        """Everything but the fingerprint; what earlier versions did not have is there only where it says something."""
        absent = {"fingerprint"} | ({"arrays"} if self.version == 1 else set())
        absent |= {"vae"} if self.vae is None else set()
        absent |= set() if self.conditions else {"conditions"}
        return self.model_dump(mode="json", exclude=absent)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return ((1 + self.posterior) * self.shape[0], *self.shape[1:])

    @property
    def array_bytes(self) -> int:
        return math.prod(self.stored_shape) * np.dtype(self.dtype).itemsize

    def ends(self, entry: np.void) -> list[int]:
        """Where the header of each of a sample's arrays ends among its bytes, in the order of `columns`."""
        return [int(entry[column] - entry["start"]) for column, *_ in self.columns]

    @property
    def columns(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(column, dtype, shape) of every array of a sample that the entries point at."""
        own = ["offset", "flipped"] if self.flipped else ["offset"]
        named = [(PREFIX + name, each.dtype, each.shape) for name, each in self.arrays.items()]
        return [*((column, self.dtype, self.stored_shape) for column in own), *named]


def compose(
    scanned: Sequence[Scanned],
    *,
    scale: Scale | None = None,
    shift: Scale | None = None,
    posterior: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    vae: str | None = None,
    conditions: Mapping[str, StoredCondition] | None = None,
) -> Index:
    """The index of the scanned shards, which must agree with each other. Raises DataError.

    num_classes: default is the largest label + 1, or the number of class names. scale and shift: of
    latents, one number or one a channel; scale "auto": every channel to mean 0 and deviation 1. vae: which
    autoencoder made them. conditions: of several arrays; every other array is one of its own.
    """
    first = scanned[0]
    for other in scanned[1:]:
        for what in ("dtype", "stored_shape", "flipped", "arrays"):
            if getattr(other, what) != getattr(first, what):
                raise DataError(
                    f"{other.shard.name} has {what} {getattr(other, what)}, but "
                    f"{first.shard.name} has {getattr(first, what)}; put them into folders of "
                    "their own"
                )
        if bool(other.num_labels) != bool(first.num_labels):
            raise DataError(
                f"one of {first.shard.name} and {other.shard.name} has labels and the other has "
                "none; put them into folders of their own"
            )
    labelled = bool(first.num_labels)
    worst = max(scanned, key=lambda s: s.max_label)
    if num_classes is None:
        num_classes = len(class_names) or worst.max_label + 1
    if labelled and worst.max_label >= num_classes:
        raise DataError(
            f"{worst.shard.name} holds the label {worst.max_label}, but there are {num_classes} "
            "classes; correct the labels or give --num-classes"
        )
    if not labelled and num_classes:
        raise DataError(
            f"{num_classes} classes are announced, but the samples of {first.shard.name} have no "
            ".cls member"
        )
    if class_names and len(class_names) != num_classes:
        raise DataError(f"there are {len(class_names)} class names for {num_classes} classes")
    pixels = first.dtype == "uint8"
    if pixels and (scale, shift, vae) != (None, None, None):
        raise DataError(
            "--scale, --shift and --vae belong to latents, but these shards hold uint8 pixels"
        )
    channels, *space = first.stored_shape
    count = sum(s.shard.count for s in scanned)
    values = count * math.prod(space)
    mean = np.sum([s.sums for s in scanned], 0) / values
    var = np.maximum(np.sum([s.square_sums for s in scanned], 0) / values - mean**2, 0)
    if pixels:
        one = Space.pixels(1)
        scale, shift = one.scale[0], one.shift[0]
    else:
        scale, shift = constants(scale, shift, mean, var)
    by_channel = isinstance(scale, tuple) or isinstance(shift, tuple)
    new = first.arrays or by_channel or len(space) != 2 or vae is not None
    return Index(
        kind="pixels" if pixels else "latents",
        count=count,
        version=2 if new else 1,
        arrays=first.arrays,
        vae=vae,
        conditions=dict(conditions or {}),
        shape=(channels // 2 if posterior else channels, *space),
        dtype=first.dtype,  # pyright: ignore[reportArgumentType]  checked by pydantic
        posterior=posterior,
        flipped=first.flipped,
        scale=scale,
        shift=shift,
        num_classes=num_classes,
        class_names=list(class_names),
        mean=((mean - np.array(shift)) * np.array(scale)).tolist(),
        std=(np.sqrt(var) * np.array(scale)).tolist(),
        shards=[s.shard for s in scanned],
    ).sealed()


def save(index: Index, folder: Path) -> None:
    """Write `index.json`."""
    content = {**index.content(), "fingerprint": index.fingerprint}
    write_json(folder / INDEX, content)


def index_shard(path: Path, posterior: bool = False) -> Scanned:
    """Scan a shard and write its `.idx.npy` file."""
    scanned, entries = scan(path, posterior)
    content = io.BytesIO()
    np.save(content, entries, allow_pickle=False)
    write_bytes(entries_path(path), content.getvalue())
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    return scanned.model_copy(
        update={"shard": scanned.shard.model_copy(update={"entries_sha256": digest})}
    )


def load(folder: Path) -> Index:
    """The checked `index.json` of `folder`. Raises DataError."""
    path = folder / INDEX
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if any(folder.glob("*.tar")):
            raise DataError(
                f"{folder} has shards but no {INDEX}; make one with `{REINDEX}`"
            ) from None
        raise DataError(
            f"{folder} holds no data set; make one with `python -m speed_engine encode --images "
            "DIR --out DIR`"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check data.path") from None
    return read(text, str(path))


def read(text: bytes, path: str) -> Index:
    """The checked index in the text of an `index.json`, which was found at `path`. Raises DataError."""
    try:
        index = Index.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path} is damaged or of another version ({where}: {first['msg']}); rebuild it with "
            f"`{REINDEX}`"
        ) from None
    if index.sealed().fingerprint != index.fingerprint:
        raise DataError(
            f"{path} does not fit its own fingerprint (edited or damaged); rebuild it with "
            f"`{REINDEX}`"
        )
    names = [shard.name for shard in index.shards]
    if len(set(names)) != len(names) or not all(
        re.fullmatch(r"[\w-][\w.-]*\.tar", name) for name in names
    ):
        raise DataError(
            f"{path} names a shard twice or one outside of its folder; rebuild it with `{REINDEX}`"
        )
    if index.count != sum(shard.count for shard in index.shards) or not index.count:
        raise DataError(f"{path} holds no sample or miscounts them; rebuild it with `{REINDEX}`")
    return index


def load_entries(folder: Path, index: Index, shard: Shard, here: bool = True) -> np.ndarray:
    """The ENTRY rows of one shard, checked against the index and the size of the shard. Raises
    DataError. here: whether the shard is in the folder, too; one that is not has the size that the index tells.
    """
    path = folder / shard.name
    idx = entries_path(path)
    try:
        content = idx.read_bytes()
        size = path.stat().st_size if here else shard.bytes
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); restore it, or rebuild the "
            f"index with `{REINDEX}`"
        ) from None
    if hashlib.sha256(content).hexdigest() != shard.entries_sha256:
        raise DataError(
            f"{idx} is damaged or belongs to another shard; rebuild the index with `{REINDEX}`"
        )
    try:
        entries = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{idx} is no index ({error}); rebuild the index with `{REINDEX}`"
        ) from None
    if entries.dtype != entry_dtype(index.arrays) or entries.shape != (shard.count,):
        raise DataError(
            f"{idx} does not list {shard.count} samples; rebuild the index with `{REINDEX}`"
        )
    stop = entries["start"] + entries["length"]
    if size != shard.bytes:
        lost = np.flatnonzero(stop > size)
        which = (
            f"sample {lost[0]} and all after it are lost"
            if len(lost)
            else "all samples are within it"
        )
        raise DataError(
            f"{path} has {size} bytes instead of {shard.bytes} ({which}); restore it, or, if it "
            f"was changed on purpose, rebuild the index with `{REINDEX}`"
        )
    inside = (entries["start"] >= 0) & (stop <= size)
    for column, dtype, shape in index.columns:
        end = entries[column] + math.prod(shape) * np.dtype(dtype).itemsize
        inside &= (entries[column] >= entries["start"]) & (end <= stop)
    low = 0 if index.num_classes else -1
    inside &= (entries["label"] >= low) & (entries["label"] < max(index.num_classes, low + 1))
    if not inside.all():
        raise DataError(
            f"{shard.name}, sample {np.flatnonzero(~inside)[0]}: its index entry points outside "
            f"of the shard or its label is not below {index.num_classes}; rebuild the index with "
            f"`{REINDEX}`"
        )
    return entries


def verify(folder: Path) -> list[str]:
    """Read every byte of the set; a sentence for each fault, naming shard and sample. Empty = all
    is well.
    """
    try:
        index = load(folder)
    except DataError as error:
        return [str(error)]
    problems: list[str] = []
    for shard in index.shards:
        try:
            entries = load_entries(folder, index, shard)
        except DataError as error:
            problems.append(str(error))
            continue
        digest, faults = hashlib.sha256(), []
        with open(folder / shard.name, "rb") as file:
            for sample, entry in enumerate(entries):
                digest.update(file.read(int(entry["start"]) - file.tell()))
                region = file.read(int(entry["length"]))
                digest.update(region)
                if zlib.crc32(region) != entry["crc32"]:
                    faults.append(
                        f"{shard.name}, sample {sample}: damaged (its CRC32 does not fit); "
                        "restore the shard"
                    )
                elif fault := misfit(index.columns, index.ends(entry), region):
                    faults.append(
                        f"{shard.name}, sample {sample}: {fault}; rebuild the index with `{REINDEX}`"
                    )
            digest.update(file.read())
        if not faults and digest.hexdigest() != shard.sha256:
            faults.append(f"{shard.name}: damaged outside of its samples; restore the shard")
        problems += faults
    return problems


def _still_there(old: Index | None, scanned: Sequence[Scanned]) -> dict[str, StoredCondition]:
    """The conditions of an earlier index whose arrays the shards still have."""
    known = {} if old is None else old.conditions
    return {name: one for name, one in known.items() if set(one.arrays) <= scanned[0].arrays.keys()}


def reindex(
    folder: Path,
    *,
    scale: Scale | None = None,
    shift: Scale | None = None,
    posterior: bool | None = None,
    num_classes: int | None = None,
    vae: str | None = None,
) -> Index:
    """Write the index of all `*.tar` in `folder`, ours or any plain WebDataset shards. Raises
    DataError.

    What is not given is taken from the index that is there, if it can be read.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder} holds no *.tar; give the folder with the shards")
    try:
        old = load(folder)
    except DataError:
        old = None
    if posterior is None:
        posterior = old.posterior if old else False
    if old and old.kind == "latents":
        scale = old.scale if scale is None else scale
        shift = old.shift if shift is None and scale != "auto" else shift
        vae = old.vae if vae is None else vae
    class_names: list[str] = []
    if old and num_classes in (None, old.num_classes):
        num_classes, class_names = old.num_classes, old.class_names
    scanned = [index_shard(path, posterior) for path in tars]
    index = compose(
        scanned,
        scale=scale,
        shift=shift,
        posterior=posterior,
        num_classes=num_classes,
        class_names=class_names,
        vae=vae,
        conditions=_still_there(old, scanned),
    )
    save(index, folder)
    return index
