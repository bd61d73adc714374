"""Rows from open files: the C++ reader and the one in Python say the same, also where a file ends early."""

import numpy as np
import pytest

from speed_engine.data.storage import rows


@pytest.mark.parametrize("reader", [rows.read_rows, rows._one_by_one])
def test_rows_come_from_their_places_and_failures_are_told(reader, tmp_path):
    content = np.arange(100, dtype=np.uint8)
    for name in "ab":
        (tmp_path / name).write_bytes(content.tobytes())
        content = content[::-1]
    with open(tmp_path / "a", "rb") as one, open(tmp_path / "b", "rb") as other:
        files = np.array([one.fileno(), other.fileno(), one.fileno(), 10**6])
        out = np.zeros((4, 10), np.uint8)
        assert reader(out, files, np.array([5, 0, 95, 0])) == [2, 3]  # ends early; no such file
    assert out[0].tolist() == [*range(5, 15)] and out[1].tolist() == [*range(99, 89, -1)]
