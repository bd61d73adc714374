"""The reference generator against published vectors, and the statistics of everything drawn from it."""

from __future__ import annotations

import math

import pytest
import torch
from speed_kernels import philox

# Known-answer vectors of philox4x32-10 from the Random123 distribution (kat_vectors): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    assert philox.philox4x32(torch.tensor(words(counter)), (k0, k1)).tolist() == words(expected)
