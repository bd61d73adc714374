"""A montage of samples: classes as rows, small pictures enlarged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_TILE = 64  # pixels of a picture's side in the grid: an 8x8 digit is enlarged 8 times
SEPARATOR = 3  # pixels between two tiles of the grid
LONGEST_NAME = 16  # letters of a class's name
PAPER, INK = (236, 236, 236), (40, 40, 40)


def as_picture(pixels_HWC: np.ndarray) -> Image.Image:
    """uint8 [H, W, 1 or 3] -> a grey or colour picture. Raises ValueError for other channels."""
    channels = pixels_HWC.shape[2]
    if channels not in (1, 3):
        raise ValueError(
            f"a picture has 1 or 3 channels, not {channels}; give the VAE that decodes the latents"
        )
    return Image.fromarray(pixels_HWC[:, :, 0] if channels == 1 else pixels_HWC)


def grid_picture(
    pixels_NHWC: np.ndarray,
    labels_N: np.ndarray | None,
    class_names: Sequence[str] = (),
    max_rows: int = 20,
    max_columns: int = 16,
) -> Image.Image:
    """A montage: one row a class with its name or number on the left; without labels nearly square.

    The first `max_rows` classes and `max_columns` samples of each are shown. Small pictures are
    enlarged by a whole factor (nearest) to a side of at least SMALLEST_TILE pixels.
    """
    num, height, width, _ = pixels_NHWC.shape
    if labels_N is None:
        columns = min(max_columns, max(1, round(num**0.5)))
        numbers = list(range(min(num, columns * max_rows)))
        rows = [numbers[i : i + columns] for i in range(0, len(numbers), columns)]
        names = [""] * len(rows)
    else:
        classes = sorted({int(label) for label in labels_N})[:max_rows]
        rows = [np.flatnonzero(labels_N == c)[:max_columns].tolist() for c in classes]
        names = [class_names[c][:LONGEST_NAME] if class_names else str(c) for c in classes]
    factor = max(1, -(-SMALLEST_TILE // min(height, width)))
    tile_h, tile_w = height * factor + SEPARATOR, width * factor + SEPARATOR
    text_size = max(14, min(28, height * factor // 4))
    font = ImageFont.load_default(size=text_size)
    margin = max(int(font.getlength(name)) for name in names)
    margin = margin + text_size if margin else 0
    columns = max(len(row) for row in rows)
    size = (margin + columns * tile_w + SEPARATOR, len(rows) * tile_h + SEPARATOR)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = SEPARATOR + r * tile_h
        if name:
            middle = (margin // 2, top + height * factor // 2)
            draw.text(middle, name, fill=INK, font=font, anchor="mm")
        for c, number in enumerate(row):
            tile = as_picture(pixels_NHWC[number]).convert("RGB")
            tile = tile.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + SEPARATOR + c * tile_w, top))
    return canvas
