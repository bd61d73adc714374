"""Where pictures may be: a folder of classes, WebDataset tars, tables of Hugging Face, a CIFAR archive. Told apart by
their files."""

from __future__ import annotations

from pathlib import Path

from . import cifar, folders, tables, tars
from .pictures import Listing


def find(place: Path, labels: bool = True) -> Listing:
    """The pictures in `place`; see the module of each kind. Raises DataError."""
    if cifar.is_one(place):
        return cifar.find(place, labels)
    own = (
        place.is_dir() and any(place.glob("*.tar")) and not any(p.is_dir() for p in place.iterdir())
    )
    if own or (place.is_file() and place.suffix == ".tar"):
        return tars.find(place, labels)
    if tables.is_one(place):
        return tables.find(place, labels)
    return folders.find(place, labels)
