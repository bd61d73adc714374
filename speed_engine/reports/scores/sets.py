"""Pictures to be scored, or to be scored against, wherever they are: as bytes, one batch after another.

A folder that `sample` wrote, a folder of classes (or tars, or a CIFAR archive) as `encode` takes it, a set that
`encode` wrote, an `.npz` with arr_0, or the word digits or glyphs (fresh ones).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from speed_engine.data import DataError, autoencoder, glyph_pictures, shards
from speed_engine.data.storage import pictures, places
from speed_engine.sampling.folder import read_recipe, sample_path, to_uint8

NAMES_OF_ARRAY = ("arr_0", "images", "x")
FIRST_GLYPH, NUM_GLYPHS = (
    glyph_pictures.FRESH + 2**30,
    6200,
)  # others than the glyphs' own score compares with


@dataclass
class Pictures:
    """uint8 [N, size, size, channels], read when they are looked at.

    read: numbers -> uint8 [B, size, size, channels]. labels: int64 [N] where the place tells classes as numbers. told:
    what a report says of them. remarks: sentences for people.
    """

    name: str
    num: int
    size: int
    channels: int
    read: Callable[[range], np.ndarray]
    labels: np.ndarray | None = None
    told: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """All of them in order."""
        for start in range(0, self.num, batch_size):
            yield self.read(range(start, min(start + batch_size, self.num)))

    def all(self) -> np.ndarray:
        """All of them at once."""
        return self.read(range(self.num))


def open_pictures(
    place: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    vae: str | None = None,
    device: torch.device | str = "cpu",
    option: str = "--samples",
) -> Pictures:
    """The pictures of `place`.

    size, channels: what they are cropped (the centre square) and scaled to, as `encode` does; default: what the first
    picture is, and every other one must be. vae: decodes an encoded set's latents. option: named in refusals. Raises
    ValueError for what is no set of pictures.
    """
    path = Path(place)
    if str(place) == "digits":
        found = _digits()
    elif str(place) == "glyphs":
        pixels, labels = glyph_pictures.draw(0, FIRST_GLYPH, NUM_GLYPHS)
        found = _in_memory("glyphs", pixels.transpose(0, 2, 3, 1), labels)
    elif path.suffix == ".npz" and path.is_file():
        found = _archive(path)
    elif not path.exists():
        raise ValueError(
            f"{option} {place} is not there; give a folder of images, a folder of `sample` or `encode`, an .npz, or "
            "the word digits or glyphs"
        )
    elif (path / "recipe.json").exists():
        found = _samples(path)
    elif (path / "index.json").exists():
        found = _encoded(path, vae, device)
    else:
        return _of_files(path, size, channels, option)
    return _fitted(found, size or found.size, channels or found.channels)


def _digits() -> Pictures:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "scoring digits needs scikit-learn; pip install 'speed-engine[demo]'"
        ) from error
    ink, labels = load_digits(return_X_y=True)
    pixels = np.round(ink * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return _in_memory("digits", pixels, labels.astype(np.int64))


def _archive(path: Path) -> Pictures:
    with np.load(path, allow_pickle=False) as arrays:
        name = next((name for name in NAMES_OF_ARRAY if name in arrays), None)
        if name is None:
            raise ValueError(
                f"{path} has the arrays {', '.join(arrays.files)}, and none is pictures; store them as arr_0, uint8 "
                "[N, height, width, channels]"
            )
        pixels, labels = arrays[name], arrays.get("labels")
        also = [key for key in ("mu", "sigma") if key in arrays]
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] not in (1, 3):
        raise ValueError(
            f"{name} of {path} is {pixels.dtype} {list(pixels.shape)}; it must be uint8 [N, height, width, 1 or 3]"
        )
    if labels is not None and (labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu"):
        labels = None
    found = _in_memory(path.name, pixels, None if labels is None else labels.astype(np.int64))
    if also:
        found.remarks.append(
            f"{path.name} holds pictures and statistics of others (mu, sigma): the pictures are used; store the "
            "statistics in a file of their own to use them"
        )
    return found


def _in_memory(name: str, pixels: np.ndarray, labels: np.ndarray | None) -> Pictures:
    num, height, width, channels = pixels.shape
    if height != width:
        raise ValueError(f"{name} holds pictures of {height}x{width}; only square ones are scored")
    return Pictures(
        name,
        num,
        height,
        channels,
        lambda at: pixels[at.start : at.stop],
        labels,
        {"kind": "array"},
    )


def _samples(folder: Path) -> Pictures:
    recipe = read_recipe(folder)
    if recipe.get("saved_as") == "arrays":
        raise ValueError(f"{folder} holds arrays and no pictures; give a folder of pictures")
    num = recipe["num"]
    files = [sample_path(folder, recipe, n) for n in range(num)]
    missing = [file for file in files if not file.exists()]
    if missing or not num:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {num} samples; run `sample` again to finish this folder"
        )
    archive = folder / "samples.npz"
    labels = None
    if archive.exists():
        with np.load(archive, allow_pickle=False) as arrays:
            labels = arrays.get("labels")
    size, channels = _first(files[0], files[0].name)
    names = [file.name for file in files]
    reader = _reader(files.__getitem__, names, size, channels)
    found = Pictures(folder.name, num, size, channels, reader, labels)
    found.told = {"kind": "samples", "recipe": recipe}
    return found


def _encoded(folder: Path, vae: str | None, device: torch.device | str) -> Pictures:
    source = shards.Shards(folder, check_scale=False)
    facts = source.facts
    if len(facts.shape) != 3 or facts.shape[1] != facts.shape[2]:
        raise ValueError(
            f"{folder} holds samples of {list(facts.shape)}, which are no square pictures"
        )
    if facts.space.kind == "latents":
        if vae is None:
            by = f" (its data were encoded by {facts.space.vae})" if facts.space.vae else ""
            raise ValueError(
                f"{folder} holds latents; give --vae, the folder of its AutoencoderKL{by}"
            )
        decode = autoencoder.decoder(facts.space, vae, device)
    else:
        decode = None

    def read(at: range) -> np.ndarray:
        stored, _ = source.read(list(at))
        if decode is None:
            return stored.permute(0, 2, 3, 1).contiguous().numpy()
        return to_uint8(decode(source.decode(stored.to(device))))

    shape = read(range(1)).shape
    if shape[3] not in (1, 3):
        raise ValueError(f"{folder} holds {shape[3]} channels, which are no picture")
    found = Pictures(folder.name, len(source), shape[1], shape[3], read)
    found.told = {"kind": "encoded", "fingerprint": source.fingerprint}
    if facts.space.kind == "latents":
        found.remarks.append(
            f"{folder.name} is decoded from latents: the autoencoder's loss is in both"
        )
    return found


def _of_files(place: Path, size: int | None, channels: int | None, option: str) -> Pictures:
    if (place / "manifest.json").exists():  # whose grids and plots are no samples
        raise ValueError(
            f"{option} {place} is a run; give the folder that `sample` wrote, {place}/samples"
        )
    try:
        listing = places.find(place)
    except DataError as error:
        cure = "give a folder of images, of `sample` or of `encode`"
        said = str(error).replace("give --images another folder", cure)
        raise ValueError(f"{option}: {said.replace('--images', option)}") from error
    names = [picture.path for picture in listing.pictures]

    def load(
        number: int,
    ) -> pictures.Raw:  # one at a time: a tar's pictures are in no file of their own
        return listing.load(listing.pictures[number])

    own_size, own_channels = _first(load(0), names[0])
    wanted, planes = size or own_size, channels or own_channels
    labels = None
    if listing.class_names:
        labels = np.array([picture.label for picture in listing.pictures], np.int64)
    reader = _reader(load, names, wanted, planes, scaled=size is not None)
    found = Pictures(place.name, len(names), wanted, planes, reader, labels, {"kind": "files"})
    found.remarks += listing.remarks
    if listing.others:
        name, why = listing.others[0]
        found.remarks.append(
            f"left out of {place.name}: {len(listing.others)} of its files ({name}: {why})"
        )
    if size is not None and own_size != size:
        found.told["scaled_from"] = own_size
        found.remarks.append(
            f"pictures of {place.name} are cropped to their centre square and scaled to {size}x{size}, as `encode` does"
        )
    return found


def _first(raw: pictures.Raw, name: str) -> tuple[int, int]:
    """(short side, channels) of a picture."""
    try:
        with _opened(raw) as image:
            grey = image.mode in ("1", "L", "I", "I;16", "F")
            return min(image.size), 1 if grey else 3
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise ValueError(f"{name} cannot be decoded ({error}); move it away") from error


def _opened(raw: pictures.Raw) -> Image.Image:
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    plain = io.BytesIO(raw) if isinstance(raw, bytes) else raw
    return Image.open(plain, formats=pictures.FORMATS)


def _reader(
    load: Callable[[int], pictures.Raw],
    names: Sequence[str],
    size: int,
    channels: int,
    scaled: bool = False,
) -> Callable[[range], np.ndarray]:
    def one(number: int) -> np.ndarray:
        raw, name = load(number), names[number]
        try:
            if not scaled:
                _refuse_other_size(raw, name, size)
            return pictures.decode(raw, size, channels, 1).transpose(1, 2, 0)
        except pictures.PictureError as error:
            raise ValueError(f"{name} {error}; move it away") from error

    return lambda at: np.stack([one(number) for number in at])


def _refuse_other_size(raw: pictures.Raw, name: str, size: int) -> None:
    try:
        with _opened(raw) as image:
            width, height = image.size
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise pictures.PictureError(f"cannot be decoded ({error})") from error
    if (width, height) != (size, size):
        raise ValueError(
            f"{name} is {width}x{height}, and the first picture {size}x{size}; give --resize, to which the centre "
            "squares of all are scaled"
        )


def _fitted(found: Pictures, size: int, channels: int) -> Pictures:
    """The same pictures, scaled or with other channels where they have to be."""
    if (size, channels) == (found.size, found.channels):
        return found
    read, own = found.read, found.size

    def scaled(at: range) -> np.ndarray:
        parts = [pictures.decode(_plain(pixels), size, channels, 1) for pixels in read(at)]
        return np.stack(parts).transpose(0, 2, 3, 1)

    if own != size:
        found.told["scaled_from"] = own
        found.remarks.append(
            f"pictures of {found.name} are scaled from {own}x{own} to {size}x{size}"
        )
    found.read, found.size, found.channels = scaled, size, channels
    return found


def _plain(pixels_HWC: np.ndarray) -> np.ndarray:
    return pixels_HWC[:, :, 0] if pixels_HWC.shape[2] == 1 else pixels_HWC


def in_colour(pixels_NHWC: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 1 or 3] -> uint8 [B, 3, H, W]; grey is repeated."""
    three = np.broadcast_to(pixels_NHWC, (*pixels_NHWC.shape[:3], 3))
    return np.ascontiguousarray(three.transpose(0, 3, 1, 2))
