"""Many samples checked at once before their first use: the CRC32 of all their bytes, and their arrays' headers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from .npy import MAGIC, misfit
from .rows import read_rows


def sound(
    columns: Sequence[tuple[str, str, tuple[int, ...]]], entries: np.ndarray, descriptor: np.ndarray
) -> np.ndarray:
    """Which samples are as the index says, bool [N]; of the others nothing is said but that.

    columns: of the arrays, see `misfit`. entries: of the samples. descriptor: the open file of each, int64 [N].
    """
    found = np.zeros(len(entries), bool)
    ends_NC = np.stack([entries[column] - entries["start"] for column, *_ in columns], 1)
    for length in np.unique(entries["length"]).tolist():
        rows = np.flatnonzero(entries["length"] == length)
        regions = np.empty((len(rows), length), np.uint8)
        bad = read_rows(regions, descriptor[rows], entries["start"][rows])
        crc32 = np.array(
            [zlib.crc32(memoryview(regions[row])) for row in range(len(rows))], np.uint32
        )
        right = crc32 == entries["crc32"][rows]
        right[bad] = False
        found[rows] = right & _headers_fit(columns, ends_NC[rows], regions)
    return found


def _headers_fit(
    columns: Sequence[tuple[str, str, tuple[int, ...]]], ends_NC: np.ndarray, regions: np.ndarray
) -> np.ndarray:
    """Whether all arrays of each sample begin where and as the index says, bool [N].

    Most samples of a set have the same bytes before their arrays: those of the first one are read, the others compared.
    """
    ends = ends_NC[0].tolist()
    first = regions[0].tobytes()
    if misfit(columns, ends, first):
        fit = np.zeros(len(regions), bool)
    else:
        fit = (ends_NC == ends_NC[0]).all(1)
        for end in ends:
            begin = max(first.rfind(MAGIC, 0, end), 0)
            fit &= (regions[:, begin:end] == regions[0, begin:end]).all(1)
    for row in np.flatnonzero(~fit).tolist():
        fit[row] = not misfit(columns, ends_NC[row].tolist(), regions[row].tobytes())
    return fit
