"""Every random decision about the data is a pure function of (seed, step, global sample slot).

The order of the samples, flips and posterior draws come from Philox at an address, never from a stream
with hidden state: a resume stores one integer, and any number of processes sees the same batch. (The draws of t and
of the noise happen inside the `noise` kernel, what conditions drop in the conditions, at addresses of the same kind.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from speed_kernels import philox

ROUNDS = 6  # of the Feistel network; four already make it a pseudo-random permutation


def batch_indices(
    seed: int, step: int, first_slot: int, num: int, global_batch: int, num_samples: int
) -> torch.Tensor:
    """Which samples fill `num` slots of a step, from `first_slot` on. -> int64 [num], on the host.

    Slot i of step s is position p = s * global_batch + i of an endless sequence; epoch p // N visits
    each of the N samples exactly once, in an order of its own. Batches run on across epochs' ends.
    """
    position = torch.arange(num, dtype=torch.int64) + step * global_batch + first_slot
    epoch = position // num_samples
    indices = torch.empty_like(position)
    for one in epoch.unique().tolist():
        here = epoch == one
        indices[here] = permuted(position[here] % num_samples, num_samples, seed, one)
    return indices


def data_step(step: int, left_out: Sequence[int]) -> int:
    """The step whose data step `step` reads: the number `step` (from 0) of those that are not in `left_out`."""
    for each in sorted(left_out):
        step += each <= step
    return step


def permuted(position: torch.Tensor, num: int, seed: int, epoch: int) -> torch.Tensor:
    """The keyed permutation of 0..num-1 that belongs to `epoch`, at `position` (int64, any shape).

    A balanced Feistel network over the next even power of two, with Philox as its round function;
    values that fall outside are sent through again until they fall inside (cycle walking), which
    keeps the map one to one. No table: any position costs the same.
    """
    half = max(1, ((num - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    result = position.clone()
    outside = torch.ones_like(result, dtype=torch.bool)
    while bool(outside.any()):
        value = result[outside]
        left, right = value >> half, value & mask
        for number in range(ROUNDS):
            bits = philox.random_bits(
                seed, epoch, right, philox.STREAM_ORDER, 1, first_block=number
            )
            left, right = right, left ^ (bits[:, 0, 0] & mask)
        result[outside] = (left << half) | right
        outside = result >= num
    return result


def flips(seed: int, step: int, first_slot: int, num: int) -> torch.Tensor:
    """Which samples are mirrored: a fair coin for each slot. bool [num], on the host."""
    slot_B = torch.arange(num) + first_slot
    return philox.uniforms(seed, step, slot_B, philox.STREAM_FLIP, 1)[:, 0] < 0.5


def posterior_normals(
    seed: int, address_2: torch.Tensor, shape: tuple[int, ...], backend: str
) -> torch.Tensor:
    """Standard normals for a draw from the autoencoder's posterior: float32, on the address's device.

    Under a key that no run's own noise uses: seeds end at 2^62 here, and this key has bit 62 set.
    """
    from speed_kernels.noise.op import normals

    return normals(address_2, shape, seed=seed | 1 << 62, backend=backend)
