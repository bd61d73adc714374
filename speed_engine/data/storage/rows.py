"""Many rows of equal size from their places in open files, into one array."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import numpy as np
from speed_kernels import build


def slower() -> str | None:
    """Why rows are read from Python, one by one, or None."""
    return build.unavailable()


def read_rows(out: np.ndarray, descriptor: np.ndarray, offset: np.ndarray) -> list[int]:
    """Fill out (uint8 [M, size], contiguous) from files (int64 [M] descriptors) at bytes offset (int64 [M]).

    Returns the rows that could not be filled: an error, or a file that ended early. In C++ it lets
    other threads run for the whole of the call.
    """
    assert out.flags.c_contiguous and out.dtype == np.uint8
    if slower() is not None:
        return _one_by_one(out, descriptor, offset)
    num, size = out.shape
    descriptor, offset = (np.ascontiguousarray(each, np.int64) for each in (descriptor, offset))
    failed = np.empty(num, np.uint8)
    pointers = (each.ctypes.data for each in (out, descriptor, offset, failed))
    return np.flatnonzero(failed).tolist() if _function()(*pointers, num, size) else []


@functools.cache
def _function() -> Callable[..., int]:
    function = build.load("read_rows.cpp").speed_read_rows
    function.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 2]
    function.restype = ctypes.c_int64
    return function


def _one_by_one(out: np.ndarray, descriptor: np.ndarray, offset: np.ndarray) -> list[int]:
    failed = []
    places = zip(descriptor.tolist(), offset.tolist(), strict=True)
    for row, (file, place) in enumerate(places):
        try:
            complete = os.preadv(file, [memoryview(out[row])], place) == out.shape[1]
        except OSError:
            complete = False
        if not complete:
            failed.append(row)
    return failed
