"""Order and posterior draws are pure functions of (seed, step, slot)."""

import pytest
import torch

from speed_engine.data.order import batch_indices, permuted, posterior_normals


@pytest.mark.parametrize("num", [1, 2, 3, 5, 16, 17, 1797])
def test_an_epoch_visits_each_sample_once(num):
    for epoch in (0, 1):
        order = permuted(torch.arange(num), num, seed=3, epoch=epoch)
        assert sorted(order.tolist()) == list(range(num))


def test_epochs_and_seeds_have_their_own_order():
    first = permuted(torch.arange(997), 997, 0, 0)
    assert (first == permuted(torch.arange(997), 997, 0, 1)).float().mean() < 0.02
    assert (first == permuted(torch.arange(997), 997, 1, 0)).float().mean() < 0.02
    # neighbours do not stay neighbours
    assert ((first[1:] - first[:-1]).abs() == 1).float().mean() < 0.02


def test_batches_run_on_across_epochs():
    num, batch = 10, 4
    seen = torch.cat([batch_indices(5, step, 0, batch, batch, num) for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))


def test_a_batch_may_hold_several_epochs():
    seen = batch_indices(5, 0, 0, 9, 9, 3).view(3, 3)
    assert [sorted(row) for row in seen.tolist()] == [[0, 1, 2]] * 3


def test_any_split_sees_the_same_batch():
    whole = batch_indices(1, 7, 0, 12, 12, 100)
    parts = [batch_indices(1, 7, first, 3, 12, 100) for first in (0, 3, 6, 9)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_posterior_normals_stay_what_they_are(backend):
    """Runs on stored posteriors continue: these numbers may never change, on any backend."""
    found = posterior_normals(7, torch.tensor([3, 5]), (2, 1, 3), backend)
    first = [0.7087256908416748, -0.25355178117752075, 1.1270718574523926]
    second = [-2.2443735599517822, 0.9104025363922119, -2.4479355812072754]
    torch.testing.assert_close(found, torch.tensor([[first], [second]]), rtol=1e-6, atol=0)
    alone = posterior_normals(7, torch.tensor([3, 6]), (1, 1, 3), backend)
    assert torch.equal(found[1:], alone)
