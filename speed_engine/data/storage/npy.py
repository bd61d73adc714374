"""The npy files inside a shard: their headers, read without evaluating them, and the arrays that have names.

Beside its array x (`<key>.npy`) a sample may hold any number of named arrays, `<key>.<name>.npy`: what a network is
told, in the form in which `conditions` read it.
"""

from __future__ import annotations

import functools
import keyword
import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from .tar import MemberError

DTYPES = {"|u1": "uint8", "<f2": "float16", "<f4": "float32"}
NAMED_DTYPES = DTYPES | {"<i4": "int32", "<i8": "int64"}  # of what lies beside x
MAGIC = b"\x93NUMPY"
HEADER = re.compile(
    rb"\{'descr': '([|<>=]?[A-Za-z0-9]+)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,6}, ?)*\d{0,6})\), \} *\n"
)
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
TAKEN = ("x", "label", "class_names", "npy", "cls", "flipped")  # they have a place of their own
PREFIX = "array "  # of a named array's column in the entries


class NamedArray(BaseModel):
    """An array that every sample of a set holds beside x; kind: the file of `conditions` it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: tuple[int, ...]
    dtype: Literal["uint8", "int32", "int64", "float16", "float32"]
    kind: str

    @property
    def bytes(self) -> int:
        """Of one sample, without its header."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def array_of(name: str, shape: tuple[int, ...], dtype: str) -> NamedArray:
    """What the index says of a named array: numbers in a row are a `vector`, others are their name's."""
    vector = len(shape) == 1 and dtype.startswith("float")
    return NamedArray(shape=shape, dtype=dtype, kind="vector" if vector else name)  # pyright: ignore[reportArgumentType]  checked by pydantic


def name_fault(name: str) -> str:
    """Why an array cannot have this name, which becomes a keyword of the network; empty if it can."""
    if name in TAKEN:
        return f"the name {name!r} is taken"
    if keyword.iskeyword(name) or not NAME.fullmatch(name):
        return f"{name[:40]!r} cannot be an array's name; use small letters, digits and _"
    return ""


def layout(head: bytes, dtypes: Mapping[str, str]) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, header length) of a npy file that begins with `head`. Raises MemberError;
    never evaluates it.
    """
    if head[:6] != MAGIC or head[6:8] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise MemberError("its .npy member is not a npy file")
    width = 2 if head[6] == 1 else 4
    length = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    match = HEADER.fullmatch(head[8 + width : length]) if length <= len(head) else None
    if match is None:
        raise MemberError("its array has a damaged header")
    descr, fortran, sides = match.groups()
    if descr.decode() not in dtypes:
        raise MemberError(
            f"its array has dtype {descr.decode()!r}; only {', '.join(dtypes.values())} "
            "(little-endian) may be"
        )
    if fortran == b"True":
        raise MemberError("its array is in Fortran order")
    shape = tuple(int(side) for side in sides.replace(b" ", b"").split(b",") if side)
    if not all(shape):
        raise MemberError(f"its array has the empty shape {shape}")
    return dtypes[descr.decode()], shape, length


@functools.lru_cache(maxsize=64)
def _layout(head: bytes) -> tuple[str, tuple[int, ...], int]:
    """Of a whole header: all samples of a set have the same few."""
    return layout(head, NAMED_DTYPES)


def misfit(
    columns: Iterable[tuple[str, str, tuple[int, ...]]], ends: Iterable[int], region: bytes
) -> str:
    """Where the arrays of a sample are others than the index says, in words; empty where all are as it says.

    columns: (column of the entries, dtype, shape) as the index has them. ends: where the header of each ends in the
    region, all bytes of the sample.
    """
    for (column, dtype, shape), end in zip(columns, ends, strict=True):
        begin = max(region.rfind(MAGIC, 0, end), 0)
        name = column.removeprefix(PREFIX) if column.startswith(PREFIX) else "x"
        try:
            found, sides, length = _layout(region[begin:end])
        except MemberError as error:
            return f"where the index has the array {name!r}, {error}"
        if length != end - begin:
            return f"where the index has the array {name!r}, none begins"
        if (found, sides) != (dtype, shape):
            return f"the array {name!r} is {found} {sides}, but the index says {dtype} {shape}"
    return ""
