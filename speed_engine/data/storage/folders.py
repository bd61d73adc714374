"""Pictures in a folder: a sub-folder is a class. What is left out of the set is told, with the reason."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .. import DataError
from .pictures import ENDINGS, Listing, Picture

JUNK = "__MACOSX"  # what a Mac puts into its zip files
PARTS = {"train", "training", "val", "valid", "validation", "test"}  # of a set: folders of classes
NOT_AN_IMAGE = "not an image by its ending"


def natural(name: str) -> list[str | int]:
    """A key that sorts 1, 2, 10 as people do, and names with as many digits as text does."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))]


def shown(name: str) -> str:
    """A file's name as text that any file can hold: bytes that are no UTF-8 become \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def find(folder: Path, labels: bool = True) -> Listing:
    """The pictures below `folder`, by class (in natural order) and path.

    labels: a sub-folder is a class, whatever lies deeper in it belongs to it; a flat folder has no classes. False: all
    pictures at any depth, without classes. Links are followed, each folder once a class. Raises DataError where there
    is no image, where images lie both beside and inside sub-folders, or where the sub-folders are parts of a set.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give --images a folder of images")
    walk = _Walk(folder)
    if not labels:
        pictures = walk.pictures(folder, None)
        classes: list[Path] = []
    else:
        files, inside = walk.entries(folder)
        classes = sorted(inside, key=lambda path: (natural(path.name), path.name))
        pictures = walk.pick(files, None)
        if classes and pictures:
            raise DataError(
                f"{folder} has images both beside and inside its sub-folders ({pictures[0].path}); a "
                "sub-folder is a class, so move the others into one or away"
            )
        found = [(path, walk.pictures(path, 0)) for path in classes]
        empty = [path.name for path, its in found if not its]
        if empty and len(empty) < len(found):
            walk.remarks.append(f"no image in, and so no class: {_some(empty)}")
        found = [(path, its) for path, its in found if its]
        _refuse_parts(folder, [path for path, _ in found], [its for _, its in found])
        classes = [path for path, _ in found]
        pictures += [
            picture._replace(label=label) for label, (_, its) in enumerate(found) for picture in its
        ]
    if not pictures:
        endings = ", ".join(sorted(ENDINGS))
        raise DataError(f"{folder} holds no image ({endings}); give --images another folder")
    if walk.hidden:
        walk.remarks.append(f"hidden, and so left out: {_some(walk.hidden)}")
    names = [shown(path.name) for path in classes]
    return Listing(pictures, names, walk.others, walk.remarks, lambda each: folder / each.path)


class _Walk:
    """What was met on the way, beside pictures."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.others: list[tuple[str, str]] = []
        self.hidden: list[str] = []
        self.remarks: list[str] = []

    def entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """(files, folders) in `folder`, sorted; without hidden ones."""
        files, folders = [], []
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name == JUNK:
                self.hidden.append(self._name(path))
            else:
                (folders if path.is_dir() else files).append(path)
        return files, folders

    def pictures(self, top: Path, label: int | None) -> list[Picture]:
        """All pictures at any depth, by path."""
        files = list(self._files(top, set()))
        return self.pick(sorted(files), label)

    def _files(self, folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            self.others.append((self._name(folder), "a link to a folder that is there already"))
            return
        seen.add((status.st_dev, status.st_ino))
        files, folders = self.entries(folder)
        yield from files
        for inner in folders:
            yield from self._files(inner, seen)

    def pick(self, files: list[Path], label: int | None) -> list[Picture]:
        pictures = []
        for path in files:
            name = path.relative_to(self.root).as_posix()
            if path.is_symlink() and not path.exists():
                self.others.append((shown(name), "a link to nothing"))
            elif path.suffix.lower() in ENDINGS and path.is_file():
                pictures.append(Picture(name, path.stat().st_size, label))
            else:
                self.others.append((shown(name), NOT_AN_IMAGE))
        return pictures

    def _name(self, path: Path) -> str:
        return shown(path.relative_to(self.root).as_posix())


def _refuse_parts(folder: Path, classes: list[Path], found: list[list[Picture]]) -> None:
    """One level too high: `train` with the classes in it would become the only class."""
    deeper = all(picture.path.count("/") > 1 for its in found for picture in its)
    parts = len(classes) == 1 or all(path.name.lower() in PARTS for path in classes)
    if not classes or not deeper or not parts:
        return
    first = classes[0]
    inner = {picture.path.split("/")[1] for picture in found[0]}
    raise DataError(
        f"{shown(str(folder))} has the one class {shown(first.name)}"
        f"{'' if len(classes) == 1 else ' (and ' + _some([p.name for p in classes[1:]]) + ')'}, and its images lie in "
        f"{len(inner)} folders below it; if those are the classes, give --images {shown(str(first))}, and if there are "
        "none, --no-labels"
    )


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more
