"""Pictures in the parquet or arrow files of a Hugging Face data set, as a hub keeps them or `save_to_disk` writes them.

    image    struct {bytes, path}, or plain bytes: the picture's file
    label    whole numbers, named by the ClassLabel of the schema's own notes, or names

Nothing is downloaded and nothing is executed. This is the only file that imports pyarrow.
"""

from __future__ import annotations

import bisect
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import DataError
from .folders import PARTS, natural
from .pictures import Listing, Picture, PictureError

ENDINGS = (".parquet", ".arrow")
IMAGES = ("image", "img", "jpg", "png", "webp", "pixel_values")  # in order of preference
LABELS = ("label", "fine_label", "labels", "cls", "class", "class_id")
TEXTS = ("caption", "captions", "text", "txt", "prompt")
KEPT = 2  # groups of rows in memory: threads that decode are near each other
MAX_LABEL = 2**31 - 2


def is_one(place: Path) -> bool:
    """Whether this is such a file, or a folder with some (or with a folder `data` of them)."""
    return place.suffix in ENDINGS if place.is_file() else bool(_files(place))


def find(place: Path, labels: bool = True) -> Listing:
    """The pictures of one file or of all files of a folder, in the order of names and rows.

    Of a data set in parts it is the training part, where the files are named so. labels: the ClassLabel or label
    column; False: none is read. Raises DataError, naming the file.
    """
    paths, remarks = ([place], []) if place.is_file() else _part(place, _files(place))
    tables = [_Table(path) for path in paths]
    first = tables[0]
    columns = _columns(first, labels)
    for table in tables[1:]:
        if (other := _columns(table, labels)) != columns:
            raise DataError(
                f"{table.path} has {other}, but {first.path.name} has {columns}; give a folder of one data set"
            )
    if columns.texts:
        remarks.append(f"{', '.join(columns.texts)} of each picture is not stored")
    if len(columns.labels) > 1:
        remarks.append(f"classes are those of {columns.labels[0]}, not of {columns.labels[1]}")
    pictures: list[Picture] = []
    told: list[Any] = []
    where: dict[str, tuple[_Table, int]] = {}
    for table in tables:
        values = table.values(columns.labels[0]) if columns.labels else [None] * table.num_rows
        told += values
        for row in range(table.num_rows):
            name = f"{table.path.name}/{row:07d}"
            pictures.append(Picture(name, table.share(row), None))
            where[name] = table, row
    if not pictures:
        raise DataError(f"{place} holds no picture; give --images another file")
    kept, others, names = _labelled(pictures, told, columns.names, place)
    return Listing(kept, names, others, remarks, _loader(where, columns.image))


@dataclass(frozen=True)
class _Columns:
    """What is read of a table. labels: the one that is used, and a second one. names: of the classes, by number."""

    image: str
    labels: tuple[str, ...]
    names: tuple[str, ...]
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"image {self.image}, label {', '.join(self.labels) or 'none'} ({len(self.names)} names)"


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"parquet and arrow files need pyarrow ({error}); `pip install pyarrow`"
        ) from None
    return pyarrow


class _Table:
    """One file, in groups of rows that are read one at a time. Raises DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrow = _pyarrow()
        self.lock = threading.Lock()
        self.groups: list[int] = []  # the first row of each, and the end
        self.sizes: list[int] = []  # bytes of each group
        self._read: Callable[[int, str], Any]
        try:
            schema = self._open_parquet() if path.suffix == ".parquet" else self._open_arrow()
        except (OSError, ValueError, self.arrow.ArrowException) as error:
            raise self._damaged(error) from None
        self.fields = {name: schema.field(name).type for name in schema.names}
        self.features = _features(schema.metadata or {})

    @property
    def num_rows(self) -> int:
        return self.groups[-1]

    def _open_parquet(self) -> Any:
        file = self.arrow.parquet.ParquetFile(self.path)
        groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
        self.groups = [0]
        for group in groups:
            self.groups.append(self.groups[-1] + group.num_rows)
            self.sizes.append(
                sum(group.column(c).total_compressed_size for c in range(group.num_columns))
            )
        self._read = lambda group, column: (
            file.read_row_group(group, columns=[column]).column(column).combine_chunks()
        )
        return file.schema_arrow

    def _open_arrow(self) -> Any:
        source = self.arrow.memory_map(str(self.path))
        try:
            reader = self.arrow.ipc.open_stream(source)
            batches = list(reader)
        except self.arrow.ArrowInvalid:  # not a stream, as `datasets` writes it, but a file
            source.seek(0)
            reader = self.arrow.ipc.open_file(source)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.groups = [0]
        for batch in batches:
            self.groups.append(self.groups[-1] + batch.num_rows)
            self.sizes.append(batch.nbytes)
        self._read = lambda group, column: batches[group].column(column)
        return reader.schema

    def group_of(self, row: int) -> int:
        return bisect.bisect_right(self.groups, row) - 1

    def read(self, group: int, column: str) -> Any:
        """A column of a group, an arrow array."""
        try:
            with self.lock:
                return self._read(group, column)
        except (OSError, ValueError, self.arrow.ArrowException) as error:
            raise self._damaged(error) from None

    def values(self, column: str) -> list[Any]:
        """A whole column, which must be small."""
        return [
            value
            for group in range(len(self.groups) - 1)
            for value in self.read(group, column).to_pylist()
        ]

    def share(self, row: int) -> int:
        """Bytes that a row has in the file, on average over its group: a file's tables do not tell more."""
        group = self.group_of(row)
        return self.sizes[group] // (self.groups[group + 1] - self.groups[group])

    def _damaged(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())[:120]
        return DataError(f"{self.path} cannot be read ({reason}); fetch it again")


def _files(folder: Path) -> list[Path]:
    """The tables in a folder, or in its `data`, sorted; none of a hidden name."""
    for place in (folder, folder / "data"):
        found = [
            path
            for ending in ENDINGS
            for path in place.glob(f"*{ending}")
            if path.is_file() and not path.name.startswith((".", "cache-"))
        ]
        if found:
            return sorted(found, key=lambda path: (natural(path.name), path.name))
    return []


def _part(folder: Path, paths: list[Path]) -> tuple[list[Path], list[str]]:
    """(the files of the training part, remarks), by the names that a hub gives: train-00000-of-00004.parquet."""
    parts: dict[str, list[Path]] = {}
    for path in paths:
        word = re.split(r"[-_.]", path.stem)[0].lower()
        parts.setdefault(word if word in PARTS else "", []).append(path)
    if len(parts) == 1:
        return paths, []
    for word in ("train", "training"):
        if word in parts:
            left = [path for path in paths if path not in parts[word]]
            what = f"{len(left)} files of other parts are left out, {left[0].name} first"
            return parts[word], [f"{what}; give --images one file to take it"]
    raise DataError(
        f"{folder} holds several parts ({', '.join(sorted(parts)) or 'without names'}) and none is called train; give "
        "--images a folder of one part, or one file"
    )


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What the schema's own notes say of each column; nothing where they cannot be understood."""
    try:
        found = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: each for name, each in found.items() if isinstance(each, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _columns(table: _Table, wanted: bool) -> _Columns:
    """Which columns hold what. Raises DataError where there is no image, or there are several."""
    types = table.arrow.types

    def kind(name: str) -> str:
        return str(table.features.get(name, {}).get("_type", ""))

    def binary(each: Any) -> bool:
        return types.is_binary(each) or types.is_large_binary(each)

    def holds_bytes(name: str) -> bool:
        each = table.fields[name]
        if types.is_struct(each):
            inner = {each.field(i).name: each.field(i).type for i in range(each.num_fields)}
            return "bytes" in inner and binary(inner["bytes"])
        return binary(each)

    def preferred(names: list[str], order: tuple[str, ...]) -> list[str]:
        return sorted(names, key=lambda n: order.index(n) if n in order else len(order))

    images = preferred([name for name in table.fields if holds_bytes(name)], IMAGES)
    if not images:
        raise DataError(
            f"{table.path} has no column of pictures (a struct with bytes, or bytes); it has "
            f"{', '.join(map(str, list(table.fields)[:8]))}"
        )
    if len(images) > 1 and images[0] not in IMAGES:
        raise DataError(
            f"{table.path} has several columns of pictures ({', '.join(images[:4])}); write a table with one of them"
        )

    def is_label(name: str) -> bool:
        each = table.fields[name]
        plain = types.is_integer(each) or types.is_string(each) or types.is_large_string(each)
        return plain and (kind(name) == "ClassLabel" or name in LABELS)

    labels = preferred([name for name in table.fields if is_label(name)], LABELS) if wanted else []
    given = table.features.get(labels[0], {}).get("names") if labels else None
    names = tuple(map(str, given)) if isinstance(given, list) else ()
    texts = tuple(name for name in table.fields if name in TEXTS)
    return _Columns(images[0], tuple(labels[:2]), names, texts)


def _labelled(
    pictures: list[Picture], told: list[Any], names: tuple[str, ...], place: Path
) -> tuple[list[Picture], list[tuple[str, str]], list[str]]:
    """(pictures with their classes, those without one, class names). Raises DataError for a label that cannot be."""
    absent = [label is None or label == -1 for label in told]  # -1: a hub's word for none
    if all(absent):
        return pictures, [], []
    if any(isinstance(label, str) for label in told):
        found = sorted({*map(str, told)} - {"None", "-1"}, key=lambda name: (natural(name), name))
        numbers = {name: number for number, name in enumerate(found)}
        told, names = [numbers.get(str(label)) for label in told], tuple(found)
    last = len(names) - 1 if names else MAX_LABEL
    kept, others = [], []
    for picture, label, none in zip(pictures, told, absent, strict=True):
        if none:
            others.append((picture.path, "it has no label, and others have one"))
        elif not 0 <= label <= last:
            raise DataError(f"{place}, {picture.path}: the label {label} is not from 0 to {last}")
        else:
            kept.append(picture._replace(label=int(label)))
    return kept, others, list(names)


def _loader(where: dict[str, tuple[_Table, int]], column: str) -> Callable[[Picture], bytes]:
    """The content of a picture's file; the groups of rows that were read last stay in memory."""
    kept: OrderedDict[tuple[Path, int], Any] = OrderedDict()
    lock = threading.Lock()

    def load(picture: Picture) -> bytes:
        table, row = where[picture.path]
        group = table.group_of(row)
        with lock:
            key = table.path, group
            if key not in kept:
                kept[key] = table.read(group, column)
            kept.move_to_end(key)
            while len(kept) > KEPT:
                kept.popitem(last=False)
            array = kept[key]
        value = array[row - table.groups[group]].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise PictureError("the table holds no bytes of it")
        return bytes(content)

    return load
