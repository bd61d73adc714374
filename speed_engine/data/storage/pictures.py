"""Image files to arrays: find them, decode them, crop and scale them.

Files are hostile until decoded: only plain raster formats are let near a decoder (no PostScript, no
plug-ins), the number of pixels is limited before anything is decompressed, and every failure
becomes a `PictureError` with a reason, so that one bad file among a million ends up in a list.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import DataError

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
LARGE_PIXELS = 16_000_000  # a picture takes up to 20 bytes a pixel while it is decoded


class PictureError(ValueError):
    """An image that cannot be used; the text is a reason without its place."""


class Picture(NamedTuple):
    """One image file: its path below the image folder, its size in bytes, its class or None."""

    path: str
    num_bytes: int
    label: int | None


def find(folder: Path) -> tuple[list[Picture], list[str], list[str]]:
    """(pictures, class names, other files) below `folder`, sorted by class and path.

    A sub-folder is a class, whatever lies deeper in it belongs to it; a flat folder has no classes.
    Hidden files are passed over. Raises DataError where there is no image, or where images lie both
    beside and inside sub-folders.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give --images a folder of images")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    classes = [path for path in entries if path.is_dir()]
    flat, others = _pick([path for path in entries if not path.is_dir()], folder, None)
    if not classes:
        pictures = flat
    elif flat:
        raise DataError(
            f"{folder} has images both beside and inside its sub-folders ({flat[0].path}); a "
            "sub-folder is a class, so move the others into one or away"
        )
    else:
        pictures = []
        for label, root in enumerate(classes):
            files = [Path(top) / name for top, _, names in os.walk(root) for name in names]
            inside, strange = _pick(sorted(files), folder, label)
            pictures += inside
            others += strange
    if not pictures:
        endings = ", ".join(sorted(ENDINGS))
        raise DataError(f"{folder} holds no image ({endings}); give --images another folder")
    return pictures, [path.name for path in classes], others


def _pick(files: list[Path], root: Path, label: int | None) -> tuple[list[Picture], list[str]]:
    pictures, others = [], []
    for path in files:
        name = path.relative_to(root).as_posix()
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in ENDINGS and path.is_file():
            pictures.append(Picture(name, path.stat().st_size, label))
        else:
            others.append(name)
    return pictures, others


def decode(
    path: Path,
    size: int,
    channels: int,
    min_side: int,
    large: AbstractContextManager[Any] | None = None,
) -> np.ndarray:
    """The image as uint8 [channels, size, size]: turned as its EXIF says, the centre square,
    scaled.

    large: held while one of more than LARGE_PIXELS is decoded, so that many threads do not hold many.
    channels: 3 (RGB) or 1 (grey). Transparent parts become white; 16-bit images are scaled to 8.
    Raises PictureError.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
            if min(width, height) < min_side:
                raise PictureError(
                    f"too small ({width} x {height}); the short side must have {min_side}"
                )
            alone = large is not None and width * height > LARGE_PIXELS
            with large if alone else contextlib.nullcontext():  # type: ignore[union-attr]
                flat = _eight_bits(ImageOps.exif_transpose(image), channels)
                square = ImageOps.fit(flat, (size, size), method=Image.Resampling.BICUBIC)
                del flat
    except PictureError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged or hostile bytes
        reason = str(error).replace(str(path), "").replace("''", "").strip() or "no reason given"
        raise PictureError(f"cannot be decoded: {reason} ({type(error).__name__})") from error
    values = np.asarray(square, np.uint8).reshape(size, size, channels)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode RGB or L."""
    from PIL import Image

    mode = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I"):  # 16-bit grey; a plain convert would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError("has more than 16 bits per value")
        grey = Image.fromarray(np.round(values / 257.0).astype(np.uint8))
        return grey.convert(mode)
    if image.mode == "F":
        raise PictureError("holds floating-point values")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert(mode)
    return image.convert(mode)
