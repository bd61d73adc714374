"""Loss spikes, judged bin by bin of the log of the signal-to-noise ratio, never by the mean loss.

The mean loss moves with the mix of time steps that a method draws, and is ruled by a few bins. Within a bin of ln SNR
the squared error of one sample is comparable to that of another whatever the method does, so each bin has its own
statistics: the mean and the variance of the log of the samples' squared errors (a log, for the errors are skewed) in
each window, a window being what one line of the log covers. A bin spikes where

    (mean now - mean before) / sqrt(variance of a sample / samples now + variance of the means before) > spike_sigmas

and its typical error has grown by a fifth at least. "Before" are the last spike_history windows without a spike. Errors
that are not finite are the guard's business and are left out here.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

EDGES = torch.arange(
    -12.0, 12.1, 1.5, dtype=torch.float64
)  # of the bins of ln SNR; the outer are open
BINS = len(EDGES) - 1
FEWEST_WINDOWS, FEWEST_SAMPLES = 8, 8  # before a bin is judged; in a bin of a window
SMALLEST = math.log(1.2)  # a growth that is worth a word


class Bins:
    """Per bin of ln SNR the number of samples, and sums of the log of their errors and of its square, on the device.

    log_snr_T: of each row of the table. lanes: see `Meter`.
    """

    def __init__(self, log_snr_T: Tensor, lanes: int, device: torch.device) -> None:
        bin_T = torch.bucketize(log_snr_T.double().cpu().clamp(-1e9, 1e9), EDGES[1:-1])
        self.bin_T = bin_T.to(device)
        self.sums = torch.zeros(lanes, 3, BINS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, errors_B: Tensor, row_B: Tensor, lane: int = 0) -> None:
        """Add the squared errors of one micro-batch at these rows."""
        finite_B = errors_B.isfinite().double()
        log_B = errors_B.double().clamp(1e-30, 1e30).nan_to_num(1.0).log() * finite_B
        for which, value_B in enumerate((finite_B, log_B, log_B.square())):
            self.sums[lane, which].index_add_(0, self.bin_T[row_B], value_B)


class Spikes:
    """What the windows of a run were like. sigmas, history: `train.spike_sigmas`, `train.spike_history`."""

    def __init__(self, sigmas: float, history: int) -> None:
        self.sigmas = sigmas
        self.windows: deque[Tensor] = deque(maxlen=history)  # float64 [3, BINS] each

    def verdict(self, sums_3N: Tensor) -> str | None:
        """Which bin spikes in the window with these sums, in words; the window is remembered if none does."""
        reason = self._spike(sums_3N) if len(self.windows) >= FEWEST_WINDOWS else None
        if reason is None:
            self.windows.append(sums_3N)
        return reason

    def _spike(self, now_3N: Tensor) -> str | None:
        before_W3N = torch.stack(list(self.windows))
        count_WN = before_W3N[:, 0]
        judged_WN = count_WN >= FEWEST_SAMPLES
        mean_WN = before_W3N[:, 1] / count_WN.clamp(min=1.0)
        enough_N = (judged_WN.sum(0) >= FEWEST_WINDOWS) & (now_3N[0] >= FEWEST_SAMPLES)
        num_N = judged_WN.sum(0).clamp(min=2).double()
        center_N = mean_WN.where(judged_WN, 0.0).sum(0) / num_N
        spread_N = (mean_WN - center_N).square().where(judged_WN, 0.0).sum(0) / (num_N - 1)
        total_3N = before_W3N.sum(0)
        samples_N = total_3N[0].clamp(min=1.0)
        variance_N = (total_3N[2] / samples_N - (total_3N[1] / samples_N).square()).clamp(min=0.0)
        grown_N = now_3N[1] / now_3N[0].clamp(min=1.0) - center_N
        sigma_N = (variance_N / now_3N[0].clamp(min=1.0) + spread_N).sqrt().clamp(min=1e-9)
        score_N = (grown_N / sigma_N).where(enough_N & (grown_N > SMALLEST), 0.0)
        worst = int(score_N.argmax())
        if score_N[worst] <= self.sigmas:
            return None
        low, high = EDGES[worst].item(), EDGES[worst + 1].item()
        return (
            f"the loss at ln SNR {low:g} to {high:g} is {math.exp(grown_N[worst]):.3g} times what it was in the last "
            f"{len(self.windows)} lines, {score_N[worst]:.1f} standard deviations above "
            f"(train.spike_sigmas={self.sigmas:g})"
        )
