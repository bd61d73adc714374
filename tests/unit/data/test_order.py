"""Order, flips and posterior draws are pure functions of (seed, step, slot)."""

import numpy as np
import pytest
import torch
from speed_kernels import philox

from speed_engine.data.order import flips, permuted, posterior_normals, sample_indices


def defined(position: int, num: int, seed: int, epoch: int) -> int:
    """The permutation, one position at a time, from the reference's random words."""
    half = max(1, ((num - 1).bit_length() + 1) // 2)
    while True:
        left, right = position >> half, position & ((1 << half) - 1)
        for block in range(6):
            slot, stream = torch.tensor([right]), philox.STREAM_ORDER
            word = int(philox.random_bits(seed, epoch, slot, stream, 1, first_block=block)[0, 0, 0])
            left, right = right, left ^ (word & ((1 << half) - 1))
        position = left << half | right
        if position < num:
            return position


def batch(seed: int, step: int, num: int, num_samples: int) -> np.ndarray:
    return sample_indices(seed, np.array(step), np.arange(num), num, num_samples)


@pytest.mark.parametrize(
    ("num", "seed", "epoch"), [(1, 0, 0), (2, 9, 1), (1797, 3, 7), (1_281_167, 2**62 - 1, 250)]
)
def test_the_permutation_is_the_defined_one(num: int, seed: int, epoch: int):
    """Runs go on as they began: this order may never change."""
    position = np.unique(np.linspace(0, num - 1, 12).astype(np.int64))
    expected = [defined(each, num, seed, epoch) for each in position.tolist()]
    assert permuted(position, num, seed, epoch).tolist() == expected


def test_the_order_of_the_first_version():
    """ImageNet's size, seed 0, steps 5003 to 5005 of 256: the second epoch begins in the middle of one."""
    found = sample_indices(0, np.arange(5003, 5006)[:, None], np.arange(256), 256, 1_281_167)
    assert found[:, :4].tolist() == [
        [433748, 113512, 271842, 112398],
        [1081054, 580495, 531032, 273558],
        [1028756, 636283, 826572, 511104],
    ]
    assert found.sum() == 480231375


def test_flips_are_fair_coins_of_the_reference():
    found = flips(7, np.array([[3], [4]]), np.arange(100, 400))
    for step, row in zip((3, 4), found, strict=True):
        u = philox.uniforms(7, step, torch.arange(100, 400), philox.STREAM_FLIP, 1)[:, 0]
        assert row.tolist() == (u < 0.5).tolist()


@pytest.mark.parametrize("num", [1, 2, 3, 5, 16, 17, 1797])
def test_an_epoch_visits_each_sample_once(num: int):
    for epoch in (0, 1):
        order = permuted(np.arange(num), num, seed=3, epoch=epoch)
        assert sorted(order.tolist()) == list(range(num))


def test_epochs_and_seeds_have_their_own_order():
    first = permuted(np.arange(997), 997, 0, 0)
    assert (first == permuted(np.arange(997), 997, 0, 1)).mean() < 0.02
    assert (first == permuted(np.arange(997), 997, 1, 0)).mean() < 0.02
    # neighbours do not stay neighbours
    assert (np.abs(np.diff(first)) == 1).mean() < 0.02


def test_batches_run_on_across_epochs():
    seen = np.concatenate([batch(5, step, 4, 10) for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))


def test_a_batch_may_hold_several_epochs():
    assert [sorted(row) for row in batch(5, 0, 9, 3).reshape(3, 3).tolist()] == [[0, 1, 2]] * 3


def test_any_split_sees_the_same_batch():
    parts = np.arange(12).reshape(4, 3)
    split = sample_indices(1, np.array([[[6]], [[7]]]), parts, 12, 100)
    assert split[1].ravel().tolist() == batch(1, 7, 12, 100).tolist()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_posterior_normals_stay_what_they_are(backend):
    """Runs on stored posteriors continue: these numbers may never change, on any backend."""
    found = posterior_normals(7, torch.tensor([3, 5]), (2, 1, 3), backend)
    first = [0.7087256908416748, -0.25355178117752075, 1.1270718574523926]
    second = [-2.2443735599517822, 0.9104025363922119, -2.4479355812072754]
    torch.testing.assert_close(found, torch.tensor([[first], [second]]), rtol=1e-6, atol=0)
    alone = posterior_normals(7, torch.tensor([3, 6]), (1, 1, 3), backend)
    assert torch.equal(found[1:], alone)
