"""Every random decision about the data is a pure function of (seed, step, global sample slot).

The order of the samples, flips and posterior draws come from Philox at an address, never from a stream
with hidden state: a resume stores one integer, and any number of processes sees the same batch. (The draws of t and
of the noise happen inside the `noise` kernel, what conditions drop in the conditions, at addresses of the same kind.)

Steps and slots are NumPy arrays that broadcast against each other: a call costs the same for one step as for a hundred.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from speed_kernels import philox

Steps = TypeVar("Steps", int, np.ndarray)

ROUNDS = 6  # of the Feistel network; four already make it a pseudo-random permutation


def sample_indices(
    seed: int, step: np.ndarray, slot: np.ndarray, global_batch: int, num_samples: int
) -> np.ndarray:
    """Which sample fills a slot (0 .. global_batch - 1) of a step. -> int64, of the common shape.

    Slot i of step s is position p = s * global_batch + i of an endless sequence; epoch p // N visits
    each of the N samples exactly once, in an order of its own. Batches run on across epochs' ends.
    """
    epoch, position = np.divmod(step * np.int64(global_batch) + slot, np.int64(num_samples))
    indices = np.empty_like(position)
    for one in np.unique(epoch).tolist():
        here = epoch == one
        indices[here] = permuted(position[here], num_samples, seed, one)
    return indices


def data_step(step: Steps, left_out: Sequence[int]) -> Steps:
    """The step whose data `step` reads: the number `step` (from 0) of those that are not in `left_out`.

    step: a number, or an array of them.
    """
    for each in sorted(left_out):
        step = step + (step >= each)
    return step


def permuted(position: np.ndarray, num: int, seed: int, epoch: int) -> np.ndarray:
    """The keyed permutation of 0..num-1 that belongs to `epoch`, at `position` (int64 [M]).

    A balanced Feistel network over the next even power of two, with Philox as its round function;
    values that fall outside are sent through again until they fall inside (cycle walking), which
    keeps the map one to one. No table of the samples: any position costs the same.
    """
    half = max(1, ((num - 1).bit_length() + 1) // 2)
    rounds = _round_functions(seed, epoch, half)
    result = position.copy()
    outside = np.arange(len(result))
    value = result
    while len(outside):
        left, right = value >> half, value & ((1 << half) - 1)
        for function in rounds:
            left, right = right, left ^ function[right]
        value = (left << half) | right
        result[outside] = value
        outside, value = outside[value >= num], value[value >= num]
    return result


@functools.lru_cache(maxsize=4)
def _round_functions(seed: int, epoch: int, half: int) -> np.ndarray:
    """Of each round the answer to every possible half: int64 [ROUNDS, 2**half].

    Half the bits of an index are few (2,048 for 1.3 million samples, 96 KiB), and an epoch asks for
    each answer some ten thousand times.
    """
    right, number = np.arange(1 << half), np.arange(ROUNDS)[:, None]
    words = philox.first_words(seed, epoch, right, philox.STREAM_ORDER, number)
    return words.astype(np.int64) & ((1 << half) - 1)


def flips(seed: int, step: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """Which samples are mirrored: a fair coin for each slot of each step. bool, of the common shape."""
    return philox.first_words(seed, step, slot, philox.STREAM_FLIP) < 2**31


def posterior_normals(
    seed: int, address_2: torch.Tensor, shape: tuple[int, ...], backend: str
) -> torch.Tensor:
    """Standard normals for a draw from the autoencoder's posterior: float32, on the address's device.

    Under a key that no run's own noise uses: seeds end at 2^62 here, and this key has bit 62 set.
    """
    from speed_kernels.noise.op import normals

    return normals(address_2, shape, seed=seed | 1 << 62, backend=backend)
