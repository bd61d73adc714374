"""Reads one shard from end to end and turns it into index entries.

A sample is a run of adjacent members with one key: `<key>.npy`, the array (C, *space); `<key>.cls`,
its class as ASCII digits; for latents, optionally `<key>.flipped.npy`, the latent of the mirrored
image; and any number of named arrays beside it, `<key>.<name>.npy`. Everything is checked here, once:
names, array headers (by a parser of our own, so that no pickle can run), shapes, labels, NaN and
infinity.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from .. import DataError
from .npy import DTYPES, NAMED_DTYPES, PREFIX, NamedArray, array_of, layout, name_fault
from .pictures import ENDINGS
from .tar import Member, MemberError, members

# offset, flipped: bytes of the arrays behind their npy headers (flipped = -1 without one). start,
# length: all bytes of the sample, headers and padding included; crc32 (zlib's) is over these. label
# = -1 without one.
ENTRY = np.dtype(
    [
        ("offset", "<i8"),
        ("flipped", "<i8"),
        ("start", "<i8"),
        ("length", "<i4"),
        ("crc32", "<u4"),
        ("label", "<i4"),
    ]
)
MAX_LABEL = 2**31 - 2
MAX_SAMPLE_BYTES = 2**31 - 1  # `length` has 32 bits


class Shard(BaseModel):
    """What `index.json` says about one shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    count: int
    bytes: int
    sha256: str
    entries_sha256: str


def entry_dtype(names: Iterable[str]) -> np.dtype:
    """ENTRY, and for each named array the position of its first byte."""
    return np.dtype([*ENTRY.descr, *((PREFIX + name, "<i8") for name in sorted(names))])


class Scanned(BaseModel):
    """A shard and what its samples have in common. sums, square_sums: per channel, in stored units."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shard: Shard
    dtype: str
    stored_shape: tuple[int, ...]
    flipped: bool
    arrays: dict[str, NamedArray] = {}
    num_labels: int
    max_label: int
    sums: list[float]
    square_sums: list[float]


@dataclass
class _Sample:
    key: str
    parts: dict[str, Member] = field(default_factory=dict)


def entries_path(shard: Path) -> Path:
    """`shard-000000.tar` -> `shard-000000.idx.npy`."""
    return shard.with_suffix(".idx.npy")


def scan(path: Path, posterior: bool = False) -> tuple[Scanned, np.ndarray]:
    """Everything about the shard at `path`: its summary and one ENTRY per sample. Raises DataError
    at the first fault.

    posterior: the arrays are mean and standard deviation, stacked over channels.
    """
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to nothing; restore the shard")
    with open(path, "rb") as file:
        if not file.seek(0, 2):
            raise DataError(f"{path.name} is empty; write the shard again or remove it")
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    scanner = _Scanner(path.name, view, posterior)
    try:
        return scanner.run()
    except MemberError as error:
        raise DataError(
            f"{path.name}, sample {scanner.number}: {error}; write the shard again"
        ) from None


class _Scanner:
    def __init__(self, name: str, view: memoryview, posterior: bool):
        self.name, self.view, self.posterior = name, view, posterior
        self.rows: list[tuple[int, ...]] = []
        self.arrays: dict[str, NamedArray] = {}
        self.number = 0  # the sample that a fault found now belongs to
        self.layout: tuple[str, tuple[int, ...]] | None = None
        self.flipped = False
        self.sums = np.zeros(0)
        self.square_sums = np.zeros(0)

    def run(self) -> tuple[Scanned, np.ndarray]:
        seen: set[str] = set()
        sample: _Sample | None = None
        for member in members(self.view):
            key, _, part = member.name.partition(".")
            if sample is not None and sample.key != key:
                self._add(sample)
                sample = None
            self.number = len(self.rows)
            if part not in ("npy", "cls", "flipped.npy"):
                name, _, ending = part.partition(".")
                fault = name_fault(name) if ending == "npy" else ""
                if fault or ending != "npy":
                    image = f".{part.rpartition('.')[2]}" in ENDINGS
                    cure = "; tars of images are for `encode --images`" if image else ""
                    raise MemberError(
                        f"the member {member.name!r} is not allowed; a shard holds .npy, .cls, "
                        f".flipped.npy and named arrays as .NAME.npy only{fault and f' ({fault})'}{cure}"
                    )
            if sample is None:
                if key in seen:
                    raise MemberError(f"the key {key!r} comes twice")
                seen.add(key)
                sample = _Sample(key)
            if part in sample.parts:
                raise MemberError(f"the member {member.name!r} comes twice")
            sample.parts[part] = member
            # .npy sorts last, so an unreadable header behind it belongs to the next sample.
            self.number = len(self.rows) + ("npy" in sample.parts)
        if sample is not None:
            self._add(sample)
        if self.layout is None:
            raise DataError(f"{self.name} holds no sample; remove it or write it again")
        entries = np.array(self.rows, entry_dtype(self.arrays))
        labels = entries["label"]
        shard = Shard(
            name=self.name,
            count=len(entries),
            bytes=len(self.view),
            sha256=hashlib.sha256(self.view).hexdigest(),
            entries_sha256="",
        )
        scanned = Scanned(
            shard=shard,
            dtype=self.layout[0],
            stored_shape=self.layout[1],
            flipped=self.flipped,
            arrays=self.arrays,
            num_labels=int((labels >= 0).sum()),
            max_label=int(labels.max()),
            sums=self.sums.tolist(),
            square_sums=self.square_sums.tolist(),
        )
        return scanned, entries

    def _add(self, sample: _Sample) -> None:
        self.number = len(self.rows)
        if "npy" not in sample.parts:
            raise MemberError(f"the sample {sample.key!r} has no .npy member")
        offset = self._array(sample.parts["npy"], measure=True)
        flipped = self._array(sample.parts["flipped.npy"]) if "flipped.npy" in sample.parts else -1
        if self.rows and (flipped >= 0) != self.flipped:
            raise MemberError("some samples have a .flipped.npy member and some do not")
        self.flipped = flipped >= 0
        label = self._label(sample.parts["cls"]) if "cls" in sample.parts else -1
        if self.rows and (label >= 0) != (self.rows[0][5] >= 0):
            raise MemberError("some samples have a .cls member and some do not")
        named = self._named(sample)
        start = min(member.start for member in sample.parts.values())
        stop = max(member.stop for member in sample.parts.values())
        if stop - start > MAX_SAMPLE_BYTES:
            raise MemberError(f"it has {stop - start} bytes, more than {MAX_SAMPLE_BYTES}")
        crc = zlib.crc32(self.view[start:stop])
        self.rows.append((offset, flipped, start, stop - start, crc, label, *named))

    def _label(self, member: Member) -> int:
        text = bytes(self.view[member.data : member.data + min(member.size, 40)])
        if not re.fullmatch(rb"-?[0-9]{1,10}\r?\n?", text):
            raise MemberError(f"the label {text!r} is not an integer")
        label = int(text)
        if not 0 <= label <= MAX_LABEL:
            raise MemberError(f"the label {label} is out of range")
        return label

    def _named(self, sample: _Sample) -> list[int]:
        """Check the arrays beside x; the positions of their first bytes, by name."""
        found = {
            part.removesuffix(".npy"): member
            for part, member in sample.parts.items()
            if part not in ("npy", "cls", "flipped.npy")
        }
        if self.rows and found.keys() != self.arrays.keys():
            other = sorted(found.keys() ^ self.arrays.keys())[0]
            raise MemberError(f"some samples have an array {other!r} and some do not")
        offsets = []
        for name in sorted(found):
            member = found[name]
            dtype, shape, header = layout(self._head(member), NAMED_DTYPES)
            one = array_of(name, shape, dtype)
            if self.arrays.setdefault(name, one) != one:
                wanted = self.arrays[name]
                raise MemberError(
                    f"its array {name!r} is {dtype} {shape}, but the first of the shard is "
                    f"{wanted.dtype} {wanted.shape}"
                )
            if member.size != header + one.bytes:
                raise MemberError(
                    f"its array {name!r} has {member.size - header} bytes, which does not fit its "
                    f"shape {shape}"
                )
            offset = member.data + header
            values = np.frombuffer(self.view, dtype, math.prod(shape), offset)
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise MemberError(f"its array {name!r} holds NaN or infinity")
            offsets.append(offset)
        return offsets

    def _head(self, member: Member) -> bytes:
        return bytes(self.view[member.data : member.data + min(member.size, 1024)])

    def _array(self, member: Member, measure: bool = False) -> int:
        """Check the array of one member; the position of its first byte."""
        dtype, shape, header = layout(self._head(member), DTYPES)
        if len(shape) < 2:
            raise MemberError(f"its array is not of the form (C, ...): it has the shape {shape}")
        if self.layout is None:
            if self.posterior and (shape[0] % 2 or dtype == "uint8"):
                raise MemberError(
                    f"an array of {dtype} {shape} cannot be mean and standard deviation over "
                    "channels"
                )
            self.layout = dtype, shape
            channels = shape[0] // 2 if self.posterior else shape[0]
            self.sums, self.square_sums = np.zeros(channels), np.zeros(channels)
        if (dtype, shape) != self.layout:
            raise MemberError(
                f"its array is {dtype} {shape}, but the first of the shard is {self.layout[0]} "
                f"{self.layout[1]}"
            )
        count = int(np.prod(shape))
        if member.size != header + count * np.dtype(dtype).itemsize:
            raise MemberError(
                f"its array has {member.size - header} bytes, which does not fit its shape {shape}"
            )
        offset = member.data + header
        values = np.frombuffer(self.view, dtype, count, offset).reshape(shape).astype(np.float64)
        if not np.isfinite(values).all():
            raise MemberError("its array holds NaN or infinity")
        means, stds = np.split(values, 2) if self.posterior else (values, np.zeros(1))
        if (stds < 0).any():
            raise MemberError("its array holds a negative standard deviation")
        if measure:
            space = tuple(range(1, len(shape)))
            self.sums += means.sum(space)
            self.square_sums += (means**2 + stds**2).sum(space)
        return offset
