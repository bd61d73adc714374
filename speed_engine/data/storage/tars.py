"""Pictures in WebDataset tars: a key's image (.jpg, .png, .webp ...), with its class as .cls or in .json, and its
caption as .txt."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from .. import DataError
from .folders import NOT_AN_IMAGE, natural, shown
from .pictures import ENDINGS, Listing, Picture
from .tar import Member, MemberError, members

LABELS = ("label", "cls", "class", "class_id")  # in .json, in order of preference
MOST = 1 << 20  # bytes of a label or of a .json


def find(place: Path, labels: bool = True) -> Listing:
    """The pictures in one tar, or in all *.tar of a folder, in their order.

    labels: whole numbers as they are, or names, which are numbered in natural order; False: none are read. Every
    archive is walked strictly (`tar`), nothing is extracted. Raises DataError, naming archive and member.
    """
    paths = [place] if place.is_file() else sorted(place.glob("*.tar"))
    walk = _Walk(labels)
    for path in paths:
        walk.archive(path)
    told = [name for name in walk.labels if name is not None]
    if not walk.pictures:
        raise DataError(f"{place} holds no image ({', '.join(sorted(ENDINGS))}) in its tars")
    numbers, names = _numbers(set(told))
    pictures = []
    for picture, name in zip(walk.pictures, walk.labels, strict=True):
        if name is None and told:
            walk.others.append((picture.path, "it has no label, and others have one"))
        else:
            pictures.append(picture._replace(label=None if name is None else numbers[name]))

    def load(picture: Picture) -> bytes:
        path, member = walk.places[picture.path]
        with open(path, "rb") as file:
            file.seek(member.data)
            return file.read(member.size)

    return Listing(pictures, names, walk.others, walk.remarks, load, walk.captions)


class _Walk:
    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.pictures: list[Picture] = []
        self.labels: list[str | None] = []
        self.places: dict[str, tuple[Path, Member]] = {}
        self.others: list[tuple[str, str]] = []
        self.remarks: list[str] = []
        self.captions: dict[str, list[str]] = {}

    def archive(self, path: Path) -> None:
        if not path.stat().st_size:
            raise DataError(f"{path} is empty; write it again or remove it")
        with open(path, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        key, parts, count = None, dict[str, Member](), 0
        try:
            for member in members(view, any_name=True):
                folder, slash, name = member.name.rpartition("/")
                stem, _, part = name.partition(".")
                if not stem or name.startswith("._"):
                    continue  # hidden
                if key is not None and folder + slash + stem != key:
                    self._sample(path, view, key, parts)
                    parts, count = {}, count + 1
                key = folder + slash + stem
                if part.lower() in parts:
                    raise MemberError(f"the member {member.name!r} comes twice")
                parts[part.lower()] = member
            if key is not None:
                self._sample(path, view, key, parts)
        except MemberError as error:
            raise DataError(
                f"{shown(path.name)}, sample {count}: {error}; write the tar again"
            ) from None

    def _sample(self, path: Path, view: memoryview, key: str, parts: dict[str, Member]) -> None:
        images = [
            member for part, member in parts.items() if f".{part.rpartition('.')[2]}" in ENDINGS
        ]
        label = self._label(view, parts) if self.wanted else None
        if not images:
            what = (
                "a label or caption without an image"
                if parts.keys() & {"cls", "txt", "json"}
                else NOT_AN_IMAGE
            )
            self.others.append((f"{shown(path.name)}/{key}", what))
            return
        if len(images) > 1:
            raise MemberError(f"{key!r} has {len(images)} images; a sample is one")
        name = f"{shown(path.name)}/{images[0].name}"
        if name in self.places:
            raise MemberError(f"the member {images[0].name!r} comes twice")
        self.places[name] = path, images[0]
        self.pictures.append(Picture(name, images[0].size, None))
        self.labels.append(label)
        if "txt" in parts and (caption := " ".join(self._text(view, parts["txt"]).split())):
            self.captions[name] = [caption]

    @staticmethod
    def _text(view: memoryview, member: Member) -> str:
        if member.size > MOST:
            raise MemberError(f"{member.name!r} has {member.size} bytes, more than {MOST}")
        try:
            return bytes(view[member.data : member.data + member.size]).decode()
        except UnicodeDecodeError:
            raise MemberError(f"{member.name!r} is no UTF-8 text") from None

    @staticmethod
    def _label(view: memoryview, parts: dict[str, Member]) -> str | None:
        member = parts.get("cls") or parts.get("json")
        if member is None:
            return None
        if member.size > MOST:
            raise MemberError(f"{member.name!r} has {member.size} bytes, more than {MOST}")
        text = bytes(view[member.data : member.data + member.size])
        try:
            if "cls" in parts:
                return text.decode().strip() or None
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise MemberError(f"{member.name!r} is neither text nor JSON") from None
        given = [found[name] for name in LABELS if name in found] if isinstance(found, dict) else []
        return str(given[0]) if given and isinstance(given[0], int | str) else None


def _numbers(told: set[str]) -> tuple[dict[str, int], list[str]]:
    """(number of each label, class names): whole numbers are themselves and have no names."""
    if all(name.isascii() and name.isdecimal() and len(name) < 10 for name in told):
        return {name: int(name) for name in told}, []
    names = sorted(told, key=lambda name: (natural(name), name))
    return {name: number for number, name in enumerate(names)}, names
