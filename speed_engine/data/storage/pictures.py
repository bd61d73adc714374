"""Image files to arrays: decode them, crop and scale them; and what a list of them is, wherever they come from.

Files are hostile until decoded: only plain raster formats are let near a decoder (no PostScript, no
plug-ins), the number of pixels is limited before anything is decompressed, and every failure
becomes a `PictureError` with a reason, so that one bad file among a million ends up in a list.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 100_000_000
LARGE_PIXELS = 16_000_000  # a picture takes up to 20 bytes a pixel while it is decoded


class PictureError(ValueError):
    """An image that cannot be used; the text is a reason without its place."""


class Picture(NamedTuple):
    """One image file: its path below the place that was given, its size in bytes, its class or None."""

    path: str
    num_bytes: int
    label: int | None


Raw: TypeAlias = "Path | bytes | np.ndarray"  # a file, its content, or pixels [H, W, C]


@dataclass(frozen=True)
class Listing:
    """All pictures of a place, in the order in which they are stored.

    others: (file, why it becomes no sample). remarks: what was left out besides, in sentences. load: where a picture
    is, or its content, for `decode`; safe to call from many threads. captions: of those that have any, by path.
    """

    pictures: list[Picture]
    class_names: list[str]
    others: list[tuple[str, str]]
    remarks: list[str]
    load: Callable[[Picture], Raw]
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)


def decode(
    raw: Raw,
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

    with _decoding(raw) as image:
        width, height = image.size
        if min(width, height) < min_side:
            raise PictureError(
                f"too small ({width} x {height}); the short side must have {min_side}"
            )
        alone = large is not None and width * height > LARGE_PIXELS
        with large if alone else contextlib.nullcontext():  # type: ignore[union-attr]
            flat = _eight_bits(ImageOps.exif_transpose(image), channels)
            square = ImageOps.fit(flat, (size, size), method=Image.Resampling.BICUBIC)
            del flat
        return _array(square, channels)


def decode_whole(raw: Raw, channels: int, size: tuple[int, int]) -> np.ndarray:
    """As `decode`, but as large as it is, which must be `size`, (width, height): uint8 [channels, height, width]."""
    from PIL import ImageOps

    with _decoding(raw) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.size != size:
            width, height = turned.size
            raise PictureError(f"has {width} x {height} pixels instead of {size[0]} x {size[1]}")
        return _array(_eight_bits(turned, channels), channels)


@contextlib.contextmanager
def _decoding(raw: Raw) -> Iterator[Image.Image]:
    """The picture, opened. Raises PictureError for one of too many pixels, and for whatever goes wrong within."""
    try:
        with _opened(raw) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
            yield image
    except PictureError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged or hostile bytes
        reason = (
            str(error)
            .replace(str(raw) if isinstance(raw, Path) else "\0", "")
            .replace("''", "")
            .strip()
            or "no reason given"
        )
        raise PictureError(f"cannot be decoded: {reason} ({type(error).__name__})") from error


def _array(image: Image.Image, channels: int) -> np.ndarray:
    width, height = image.size
    values = np.asarray(image, np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _opened(raw: Raw) -> Image.Image:
    from PIL import Image

    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    return Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw, formats=FORMATS)


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
