"""Pictures of letters and digits: sample i is a pure function of (seed, i), on every machine that has the same fonts.

The 62 characters 0-9 A-Z a-z in twelve of the fonts that matplotlib ships, at any place, size, angle and slant, in two
colours, the ground with a gradient and stripes. Outlines are filled by our own arithmetic (no hinting, no library's
rasteriser), and a picture is additions, products and roundings of single numbers, never a reduction or a function that
libraries round differently: the bytes depend neither on threads nor on how many pictures are drawn at a time.
"""

# N pictures, P pixels of one (row by row), E edges of an outline, R lines that it is scanned along.

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from speed_kernels import philox

from speed_engine.data import DataError

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-BoldItalic", "DejaVuSansMono"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10"),
)
SIDE = 32
CELL = 40  # pixels of a side of the atlas's cells; the outer ones are empty, so that what is outside reads as nothing
CAPITAL = 17.0  # pixels from the baseline to the top of an H
SCANS = 4  # lines that a row of pixels is scanned along
CURVE = 4  # straight pieces of a curve
FRESH = 2**31  # from here on no set is made: what scores compare with
BLOCKS = 6  # of four random words
LINE, QUADRATIC, CUBIC = 2, 3, 4  # codes of an outline's points; 1 begins a contour, 79 ends it


@dataclass(frozen=True)
class Atlas:
    """ink_FCP: the share of each pixel that is covered, float32 [fonts, characters, CELL * CELL]. sha256: of that."""

    ink_FCP: np.ndarray
    sha256: str


@functools.cache
def atlas() -> Atlas:
    """All characters of all fonts, upright; some seconds, once a process. Raises DataError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font, LoadFlags
    except ImportError:
        raise DataError(
            "the glyphs are drawn from matplotlib's fonts; run `pip install 'matplotlib>=3.10'`"
        ) from None
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    ink_FCP = np.zeros((len(FONTS), len(CHARACTERS), CELL * CELL), np.uint8)
    for f, name in enumerate(FONTS):
        font = FT2Font(str(folder / f"{name}.ttf"))
        font.set_size(64, 72)

        def outline(character: str, font: FT2Font = font) -> np.ndarray:
            font.load_char(ord(character), flags=LoadFlags.NO_HINTING)
            return edges(*font.get_path())

        unit = CAPITAL / outline("H")[:, :, 1].max()
        for c, character in enumerate(CHARACTERS):
            ink_FCP[f, c] = np.floor(255 * covered(outline(character) * unit) + 0.5)
    return Atlas(
        ink_FCP.astype(np.float32) * np.float32(1 / 255),
        hashlib.sha256(ink_FCP.tobytes()).hexdigest(),
    )


def edges(points: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Closed contours as straight edges: float64 [E, 2 (from, to), 2 (x, y)]."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    start = here = np.zeros(2)
    i = 0
    t = (np.arange(1, CURVE + 1) / CURVE)[:, None]
    while i < len(codes):
        code = int(codes[i])
        if code in (LINE, QUADRATIC, CUBIC):
            control = [here, *points[i : i + code - 1]]
            while len(control) > 1:  # de Casteljau: ends in the points of the curve at all t
                control = [a + (b - a) * t for a, b in itertools.pairwise(control)]
            passed = control[0] if code != LINE else control[0][-1:]
            for there in passed:
                found.append((here, there))
                here = there
            i += code - 1
        else:
            if (here != start).any():
                found.append((here, start))
            start = here = points[i] if code == 1 else start
            i += 1
    if (here != start).any():
        found.append((here, start))
    return np.array(found).reshape(-1, 2, 2)


def covered(outline_E22: np.ndarray) -> np.ndarray:
    """The share of each pixel of a cell that lies inside: float64 [CELL * CELL]. Upwards is up; the baseline is so that
    a capital is in the middle, and the character is in the middle from left to right.

    Along each line, an edge that is crossed covers all that is to its right, with the sign of its direction: contours
    of holes run the other way.
    """
    middle = (outline_E22[:, :, 0].min() + outline_E22[:, :, 0].max()) / 2
    x_E2 = outline_E22[:, :, 0] - middle + CELL / 2
    y_E2 = (CELL + CAPITAL) / 2 - outline_E22[:, :, 1]
    y_R = (np.arange(CELL * SCANS) + 0.5) / SCANS
    top, bottom = y_E2.min(1), y_E2.max(1)
    edge, line = np.nonzero((top[:, None] <= y_R) & (y_R < bottom[:, None]))
    (x, step_x), (y, step_y) = ((each[edge, 0], np.diff(each)[edge, 0]) for each in (x_E2, y_E2))
    crossing = np.clip(x + (y_R[line] - y) * step_x / step_y, 0, CELL - 1.5)
    column = crossing.astype(np.int64)
    sign, rest = np.sign(step_y), crossing - column
    change = np.zeros((len(y_R), CELL))
    np.add.at(change, (line, column), sign * (1 - rest))
    np.add.at(change, (line, column + 1), sign * rest)
    total = change.cumsum(1)
    inside = np.minimum(np.abs(total), 1)
    share = np.add.reduce([inside[s::SCANS] for s in range(SCANS)]) / SCANS
    share[[0, -1]] = share[:, [0, -1]] = 0
    return share.reshape(-1)


def labels(first: int, count: int) -> np.ndarray:
    """The characters of samples first .. first + count - 1, in turn: int64 [count]."""
    return np.arange(first, first + count) % len(CHARACTERS)


def draw(seed: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples first .. first + count - 1: (uint8 [count, 3, 32, 32], int64 [count] in 0 .. 61).

    Raises ValueError outside 0 <= first <= first + count <= 2**32.
    """
    if not 0 <= first <= first + count <= 2**32:
        raise ValueError(f"glyphs are numbered 0 to 2**32 - 1, not {first} to {first + count - 1}")
    slots = torch.arange(first, first + count)
    words = philox.random_bits(seed, 0, slots, philox.STREAM_PICTURE, BLOCKS).reshape(count, -1)
    u = (words >> 8).numpy().astype(np.float32) * np.float32(2**-24)  # exact, in [0, 1)
    kinds = labels(first, count)
    ink_NP = _placed(u, kinds)
    ground = _ground(u)
    ink = _colour(u[:, 8:11], u[:, 7] < 0.5)
    pixels = ground + (ink[:, :, None] - ground) * ink_NP[:, None]
    pixels = np.floor(np.clip(pixels, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return pixels.reshape(count, 3, SIDE, SIDE), kinds


def _between(u_N: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.float32(low) + u_N * np.float32(high - low)


def _pixels() -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of a picture's pixels, from its middle: float32 [P] each."""
    along = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
    return np.tile(along, SIDE), np.repeat(along, SIDE)


def _placed(u: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """The ink of every pixel, 0 to 1: the atlas looked up where the picture's pixel comes from, float32 [N, P]."""
    inked = atlas().ink_FCP
    font = (u[:, 0] * np.float32(len(FONTS))).astype(np.int64)
    scale, aspect = _between(u[:, 1], 0.85, 1.15), _between(u[:, 2], 0.88, 1.12)
    half = _between(u[:, 3], -0.11, 0.11)  # tan(angle / 2): 12.5 degrees either way, without a sine
    slant = _between(u[:, 4], -0.2, 0.2)
    left, up = _between(u[:, 5], -3, 3), _between(u[:, 6], -3, 3)
    norm = 1 + half * half
    cosine, sine = (1 - half * half) / norm, (half + half) / norm
    x_P, y_P = _pixels()
    x, y = x_P - left[:, None], y_P - up[:, None]
    turned_x = cosine[:, None] * x + sine[:, None] * y
    turned_y = cosine[:, None] * y - sine[:, None] * x
    middle, last = np.float32((CELL - 1) / 2), np.float32(CELL - 1.001)
    from_x = (turned_x - slant[:, None] * turned_y) / (scale * aspect)[:, None] + middle
    from_y = turned_y / scale[:, None] + middle
    from_x, from_y = np.clip(from_x, 0, last), np.clip(from_y, 0, last)
    column, row = from_x.astype(np.int64), from_y.astype(np.int64)
    right, down = from_x - column, from_y - row
    at = ((font * len(CHARACTERS) + kinds) * CELL**2)[:, None] + row * CELL + column
    flat = inked.reshape(-1)
    above = flat[at] + (flat[at + 1] - flat[at]) * right
    below = flat[at + CELL] + (flat[at + CELL + 1] - flat[at + CELL]) * right
    return above + (below - above) * down


def _colour(u_N3: np.ndarray, dark_N: np.ndarray) -> np.ndarray:
    """A dark or a light colour, float32 [N, 3]: channels in [0, 0.45) or [0.55, 1)."""
    return u_N3 * np.float32(0.45) + np.where(dark_N, np.float32(0), np.float32(0.55))[:, None]


def _ground(u: np.ndarray) -> np.ndarray:
    """The ground's colour with its gradient and stripes, float32 [N, 3, P]; light under dark ink and the reverse."""
    x_P, y_P = _pixels()
    across, along = (_between(u[:, i], -0.006, 0.006)[:, None] for i in (14, 15))
    gradient = across * x_P + along * y_P
    height = _between(u[:, 16], 0, 0.12)[:, None]
    phase = (
        _between(u[:, 17], -0.2, 0.2)[:, None] * x_P + _between(u[:, 18], -0.2, 0.2)[:, None] * y_P
    )
    phase = phase + u[:, 19, None]
    waves = np.abs(phase - np.floor(phase) - np.float32(0.5)) * 4 - 1  # a triangle from -1 to 1
    colour = _colour(u[:, 11:14], u[:, 7] >= 0.5)
    return colour[:, :, None] + (gradient + height * waves)[:, None]
