"""Process increments delta_t = x_{t+1} - x_t and the three areas of a schedule (Wang et al. 2024,
sections 2.2 and 2.3).

Theorem 1 calls Psi_t = 2 - alpha_bar_t (1 + alpha_{t+1}) the variance of delta_t. That is the
variance of the difference of two *independently* noised copies of x0; it tends to 2. Along the
Markov chain itself the variance is `markov_variance`, about beta_{t+1}, which has no plateau.
Everything the paper builds on Psi is a statement about u = 1 - alpha_bar, so the areas here are
defined by u, which exists on every schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from speed_engine.schedules import Schedule

AREAS = ("acceleration", "deceleration", "convergence")


def mean_factor(schedule: Schedule) -> Tensor:
    """A_t = s_{t+1} - s_t: the mean of delta_t is A_t x0 (Theorem 1's phi_t, section 2.3); float64
    [T-1].
    """
    return schedule.alpha.diff()


def psi(schedule: Schedule) -> Tensor:
    """Psi_t = v_t + v_{t+1} with v = s^2 sigma^2 (Theorem 1; Sigma of section 2.3); float64 [T-1].

    On DDPM it equals 2 - alpha_bar_t (1 + alpha_{t+1}). It is the variance for two independent
    draws of eps.
    """
    variance = schedule.sigma.square()
    return variance[:-1] + variance[1:]


def psi_rate(schedule: Schedule) -> Tensor:
    """d Psi / d coordinate, in the limit of small steps 2 dv / d coordinate (section 2.3: m . n);
    float64 [T]. On a curve the derivative itself, since the rows at its ends can be far apart.
    """
    curve = schedule.curve
    if curve is None:
        (rate,) = torch.gradient(schedule.sigma.square(), spacing=(schedule.coordinate,))
    else:
        at = schedule.coordinate
        rate = torch.func.jvp(lambda t: curve(t)[1].square(), (at,), (torch.ones_like(at),))[1]
    return 2 * rate


def markov_variance(schedule: Schedule) -> Tensor:
    """Variance of x_{t+1} - x_t given x0 along the chain: beta_{t+1} + (1 - sqrt(alpha_{t+1}))^2 (1
    - alpha_bar_t); [T-1].

    Raises ValueError on continuous schedules, where the increment of an infinitesimal step has
    variance zero.
    """
    if schedule.betas is None:
        raise ValueError(
            f"schedule {schedule.kind} is continuous: the Markov increment needs a discrete one"
        )
    beta = schedule.betas[1:]
    return beta + (1 - (1 - beta).sqrt()).square() * schedule.sigma[:-1].square()


def peak_row(schedule: Schedule) -> int:
    """t_a-d: the row where u rises fastest, the end of the acceleration area (0-based)."""
    return int(schedule.noise_rate.argmax().item())


@dataclass(frozen=True)
class Areas:
    """The boundaries: acceleration is rows < peak, deceleration peak <= row < tau, convergence the
    rest.
    """

    peak: int
    tau: int
    num_rows: int

    def of_row(self, row: int) -> str:
        """The area of one row; a row at or above tau is in the convergence area whatever the peak."""
        if row >= self.tau:
            return "convergence"
        return "acceleration" if row < self.peak else "deceleration"

    def shares(self, share_edges: Tensor) -> dict[str, float]:
        """Share of the time in each area; sums to one. share_edges: the schedule's, [T+1]."""
        first, second = (float(share_edges[row]) for row in (min(self.peak, self.tau), self.tau))
        sizes = (first, second - first, 1 - second)
        return dict(zip(AREAS, sizes, strict=True))


def areas(schedule: Schedule, tau: int | None = None, r: float | None = None) -> Areas:
    """The three areas with the convergence area starting at row `tau`, or where 1/alpha_bar reaches
    `r` (t_d-c).

    Raises ValueError unless exactly one of the two is given, or where the schedule never reaches r.
    """
    if (tau is None) == (r is None):
        raise ValueError("give exactly one of tau and r to divide a schedule into its areas")
    start = tau if tau is not None else schedule.first_row(float(r or 0))
    return Areas(peak_row(schedule), start, schedule.num_rows)
