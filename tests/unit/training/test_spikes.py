"""Spikes of the loss are found bin by bin; a change of the mix of time steps is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from speed_engine.training.guard import Guard
from speed_engine.training.spikes import BINS, EDGES, Bins, Spikes

ROWS = 1000
LOG_SNR = torch.linspace(9, -9, ROWS, dtype=torch.float64)
SAMPLES = 2000


def window(
    generator: torch.Generator,
    *,
    low: int = 0,
    high: int = ROWS,
    scale: float = 1.0,
    spike: float = 1.0,
) -> tuple[Tensor, float]:
    """(a window's sums, its mean error): errors that rise by a factor of 400 from clean to noisy rows, and vary by
    half. spike: a factor of the errors at ln SNR -3 to -1.5."""
    bins = Bins(LOG_SNR, 1, torch.device("cpu"))
    row_B = torch.randint(low, high, (SAMPLES,), generator=generator)
    error_B = (
        scale * (6.0 * row_B / ROWS).exp() * (0.5 * torch.randn(SAMPLES, generator=generator)).exp()
    )
    here_B = (LOG_SNR[row_B] > -3) & (LOG_SNR[row_B] < -1.5)
    error_B = torch.where(here_B, error_B * spike, error_B)
    bins.add(error_B.float(), row_B)
    return bins.sums[0], float(error_B.mean())


def judge(generator: torch.Generator) -> tuple[Spikes, float]:
    """One that has seen 20 ordinary windows of a loss that falls by 1 % a window, and their last mean."""
    spikes, mean = Spikes(6.0, 32), 0.0
    for number in range(20):
        sums, mean = window(generator, scale=0.99**number)
        assert spikes.verdict(sums) is None
    return spikes, mean


@pytest.mark.parametrize("seed", range(4))
def test_a_spike_in_one_bin_is_found_and_another_mix_is_not(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spikes, before = judge(generator)
    noisy, mean_of_noisy = window(generator, low=ROWS // 2, scale=0.8)
    clean, _ = window(generator, high=ROWS // 4, scale=0.8)
    assert mean_of_noisy > 1.5 * before  # a threshold of the mean loss would call this a spike
    assert spikes.verdict(noisy) is None and spikes.verdict(clean) is None
    spiked, mean_of_spiked = window(generator, scale=0.8, spike=2.5)
    assert mean_of_spiked < mean_of_noisy  # and not this
    reason = spikes.verdict(spiked)
    assert (
        reason is not None
        and "at ln SNR -3 to -1.5 is" in reason
        and "standard deviations" in reason
    )
    assert spikes.verdict(spiked) is not None  # it is not remembered as what is usual
    assert spikes.verdict(window(generator, scale=0.8)[0]) is None


def test_nothing_is_judged_by_a_few(seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    spikes = Spikes(6.0, 32)
    for _ in range(7):
        spikes.verdict(window(generator)[0])
    assert spikes.verdict(window(generator, spike=100.0)[0]) is None


def test_errors_that_are_not_finite_are_left_out() -> None:
    bins = Bins(LOG_SNR, 2, torch.device("cpu"))
    errors_B = torch.tensor([1.0, float("nan"), float("inf"), 0.0])
    bins.add(errors_B, torch.tensor([0, 0, 0, ROWS - 1]), lane=1)
    assert bins.sums.isfinite().all() and bins.sums[1, 0].sum() == 2 and not bins.sums[0].any()
    assert bins.sums.shape == (2, 3, BINS) and len(EDGES) == BINS + 1


def test_the_blamed_steps_are_those_of_the_line() -> None:
    guard = Guard(5, 0, step=10)
    for _ in range(3):
        guard.update(0)
    assert guard.verdict(1.0) is None and guard.blame(None) is None and guard.guilty == []
    guard.update(0)
    guard.update(0)
    assert guard.verdict(1.0) is None
    assert guard.blame("a spike") == "a spike" and guard.guilty == guard.bad == [13, 14]
