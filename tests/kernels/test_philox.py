"""The reference generator against published vectors, and the statistics of everything drawn from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from speed_kernels import philox
from torch import Tensor

# Known-answer vectors of philox4x32-10 from the Random123 distribution (kat_vectors): counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Standardised chi-square statistic: about N(0, 1) for many cells if `expected` is right."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum().item()
    cells = counts.numel() - 1
    return (statistic - cells) / math.sqrt(2 * cells)


def table_cdf(density: Tensor) -> Tensor:
    cdf = (density.double().cumsum(0) / density.double().sum() * 2**32).round().long()
    cdf[-1] = 2**32
    return cdf


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = words(key)
    assert philox.philox4x32(torch.tensor(words(counter)), (k0, k1)).tolist() == words(expected)


def test_addresses_are_the_counter_words() -> None:
    seed = (0x299F31D0 << 32 | 0xA4093822) & philox.MAX_SEED
    bits = philox.random_bits(seed, torch.tensor(9), torch.tensor([5, 2**32 - 1]), 3, 2, 7)
    assert bits.shape == (2, 2, 4) and bits.dtype == torch.int64
    counter = torch.tensor([8, 2**32 - 1, 9, 3])
    assert torch.equal(bits[1, 1], philox.philox4x32(counter, (0xA4093822, 0x299F31D0)))


def test_first_words_are_those_of_the_reference() -> None:
    step, slot = np.array([[0], [2**32 - 1], [2**40 + 3]]), np.array([0, 5, 2**32 - 1, 2**31])
    for seed, block in ((0, 0), (2**63 - 1, 2**32 - 1)):
        found = philox.first_words(seed, step, slot, philox.STREAM_FLIP, block)
        for row, one in zip(found, step[:, 0].tolist(), strict=True):
            bits = philox.random_bits(
                seed, one, torch.from_numpy(slot), philox.STREAM_FLIP, 1, first_block=block
            )
            assert row.tolist() == bits[:, 0, 0].tolist()
    assert philox.first_words(1, 2, 3, 4).shape == ()
    with pytest.raises(ValueError, match="seed=-1"):
        philox.first_words(-1, 0, 0, 0)


def test_seed_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="seed=-1 is outside"):
        philox.key_of(-1)
    with pytest.raises(ValueError, match="outside"):
        philox.key_of(2**63)
    assert philox.key_of(2**63 - 1) == (2**32 - 1, 2**31 - 1)


def test_normals_are_box_muller_of_the_words() -> None:
    slots = torch.tensor([3, 4])
    got = philox.normals(1234567, 42, slots, philox.STREAM_EPS, 10)
    bits = philox.random_bits(1234567, 42, slots, philox.STREAM_EPS, 3)
    for sample in range(2):
        expected = []
        for block in bits[sample].tolist():
            for radius_word, angle_word in (block[:2], block[2:]):
                radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
                quadrant, low = angle_word >> 30, angle_word % 2**30
                angle = math.pi / 2 * (quadrant + (2 * low - 2**30 + 1) / 2**31)
                expected += [radius * math.cos(angle), radius * math.sin(angle)]
        # The textbook form loses digits near multiples of pi/2, the reference does not.
        assert got[sample].tolist() == pytest.approx(expected[:10], rel=1e-12, abs=1e-14)


def test_extreme_words_give_finite_normals() -> None:
    extremes = torch.tensor([0, 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    grid = torch.cartesian_prod(extremes, extremes, extremes[:1], extremes[:1])
    normals = philox.box_muller(grid)
    assert torch.isfinite(normals).all() and (normals != 0).all()
    # The largest radius a 32-bit word can give.
    assert normals.abs().max().item() == pytest.approx(math.sqrt(-2 * math.log(2**-33)), rel=1e-9)


def test_float32_normals_are_the_rounded_float64_ones() -> None:
    args = (7, 1, torch.arange(4), philox.STREAM_SAMPLE, 33)
    assert torch.equal(
        philox.normals(*args, dtype=torch.float32), philox.normals(*args).to(torch.float32)
    )


def test_moments_tails_and_distribution_of_normals() -> None:
    num = 2**20
    x = philox.normals(3, 5, torch.arange(16), philox.STREAM_EPS, num // 16).flatten()
    # Standard errors of the first four moments of num normals; six of them.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - expected) < 6 * math.sqrt(variance / num)
    uniform = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    counts = torch.histc(uniform, bins=1024, min=0, max=1)
    assert abs(chi_square(counts, torch.full_like(counts, num / 1024))) < 6
    for bound in (3.0, 4.0):
        expected = num * math.erfc(bound / math.sqrt(2))
        assert abs((x.abs() > bound).sum().item() - expected) < 6 * math.sqrt(expected)
    assert 4.5 < x.abs().max().item() < 6.7


def test_uniforms_fill_the_open_interval() -> None:
    u = philox.uniforms(3, 5, torch.arange(64), philox.STREAM_FLIP, 1023)
    assert u.shape == (64, 1023) and u.min() > 0 and u.max() < 1
    counts = torch.histc(u, bins=256, min=0, max=1)
    assert abs(chi_square(counts, torch.full_like(counts, u.numel() / 256))) < 6


@pytest.mark.parametrize("axis", ["seed", "step", "slot", "stream", "element"])
def test_neighbouring_addresses_are_independent(axis: str) -> None:
    seed, step, slot, stream, num = 11, 20, 30, 1, 2**16
    a = philox.normals(seed, step, torch.tensor([slot]), stream, num + 1)[0]
    if axis == "element":
        a, b = a[:-1], a[1:]
    else:
        seed, step = seed + (axis == "seed"), step + (axis == "step")
        slot, stream = slot + (axis == "slot"), stream + (axis == "stream")
        a, b = a[:-1], philox.normals(seed, step, torch.tensor([slot]), stream, num)[0]
    assert not torch.equal(a, b)
    for x, y in ((a, b), (a**2 - 1, b**2 - 1), (a.abs() - a.abs().mean(), b)):
        correlation = (x * y).mean() / (x.std() * y.std())
        assert abs(correlation.item()) < 6 / math.sqrt(num)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 32, 100, 256, 1000, 1021, 4096])
def test_strata_are_a_permutation(num_slots: int) -> None:
    stride = philox.stratum_stride(num_slots)
    assert (
        stride >= max(1, round(0.6180339887498949 * num_slots)) and math.gcd(stride, num_slots) == 1
    )
    for step in (0, 17):
        u = philox.uniform_draw(5, step, torch.arange(num_slots), num_slots, True)
        strata = (u * num_slots) >> 32
        assert sorted(strata.tolist()) == list(range(num_slots))


@pytest.mark.parametrize("num_slots", [64, 128, 256, 512, 1024, 2048, 4096])
def test_every_run_of_slots_is_spread(num_slots: int) -> None:
    u = philox.uniform_draw(5, 3, torch.arange(num_slots), num_slots, True)
    strata = (u * num_slots) >> 32
    for parts in (2, 4, 8):
        part = strata[num_slots // parts : 2 * num_slots // parts].sort().values
        gaps = torch.diff(torch.cat((part, part[:1] + num_slots)))
        assert gaps.max() <= 8 * parts  # `parts` on average, and half the batch without the stride


def test_no_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="num_slots=0"):
        philox.stratum_stride(0)


def test_independent_rows_follow_the_density() -> None:
    density = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.05
    density[[7, 49]] = 0
    num = 2**17
    rows = philox.row_draw(9, 4, torch.arange(num), table_cdf(density), num, False)
    counts = torch.bincount(rows, minlength=50)
    assert counts[7] == 0 and counts[49] == 0
    keep = density > 0
    assert abs(chi_square(counts[keep], (density / density.sum() * num)[keep].double())) < 6


def test_stratified_rows_follow_the_density_in_every_batch() -> None:
    density = torch.rand(50, generator=torch.Generator().manual_seed(1)) + 0.05
    density[:3] = 0
    num = 4096
    rows = philox.row_draw(9, 4, torch.arange(num), table_cdf(density), num, True)
    counts = torch.bincount(rows, minlength=50)
    # One draw a stratum: a row's count differs from its mass by less than the two strata that it cuts.
    assert (counts - density / density.sum() * num).abs().max() < 2
    assert (counts[:3] == 0).all()


def test_stratified_rows_of_one_slot_follow_the_density_over_steps() -> None:
    density = torch.tensor([5.0, 1.0, 3.0, 0.5, 0.5, 2.0])
    cdf, num_steps = table_cdf(density), 800
    rows = [
        philox.row_draw(1, step, torch.tensor([6]), cdf, 8, True).item()
        for step in range(num_steps)
    ]
    counts = torch.bincount(torch.tensor(rows), minlength=6)
    assert abs(chi_square(counts, density.double() / density.sum() * num_steps)) < 6


def test_rows_at_the_edges_of_the_table() -> None:
    one_row = philox.row_draw(1, 2, torch.arange(64), torch.tensor([2**32]), 64, True)
    assert (one_row == 0).all()
    last_only = torch.tensor([0, 0, 0, 2**32])
    assert (philox.row_draw(1, 2, torch.arange(64), last_only, 64, False) == 3).all()
