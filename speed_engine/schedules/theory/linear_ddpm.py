"""Theorem 1 and its closed forms for the linear DDPM schedule (Wang et al. 2024, sections 2.2, 2.5
and A.8).

Time is the paper's: t = 1 .. T, so row j of a table is t = j + 1. beta_t = beta_0 + Delta t / T
with Delta = beta_T - beta_1 and beta_0 = beta_1 - Delta / T (A.8.1; the printed "1 - Delta / T" is
a misprint, as is the missing 2 in section 2.2's r_hat). On this schedule alone tau has a closed
form; the engine uses the true alpha_bar (`Schedule.first_row`) everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearDDPM:
    """The constants of the equidistant betas; `t` below is 1-based and may be fractional."""

    num_steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02

    @property
    def delta(self) -> float:
        """Delta_beta = max beta - min beta."""
        return self.beta_last - self.beta_first

    @property
    def beta_zero(self) -> float:
        """beta_0 = beta_1 - Delta / T (A.8.1)."""
        return self.beta_first - self.delta / self.num_steps

    def exponent(self, t: float) -> float:
        """beta_0 t + Delta t^2 / (2 T), the exponent of Lemma 1."""
        return self.beta_zero * t + self.delta * t * t / (2 * self.num_steps)

    def alpha_bar_bound(self, t: float) -> float:
        """Lemma 1: alpha_bar_t <= exp(-exponent); at most 0.0023 too large."""
        return math.exp(-self.exponent(t))

    def phi_hat(self, t: float) -> float:
        """Theorem 1's upper bound of ||phi_t||^2 / ||E x0||^2: beta_max exp(-exponent)."""
        return self.beta_last * self.alpha_bar_bound(t)

    def psi_hat(self, t: float) -> float:
        """Theorem 1's lower bound of Psi_t: 2 - 2 exp(-exponent)."""
        return 2 - 2 * self.alpha_bar_bound(t)

    def psi_hat_rate(self, t: float) -> float:
        """d Psi_hat / dt = 2 (beta_0 + Delta t / T) exp(-exponent) (definition of t_a-d)."""
        return 2 * (self.beta_zero + self.delta * t / self.num_steps) * self.alpha_bar_bound(t)

    def t_acceleration_end(self) -> float:
        """t_a-d = sqrt(T / Delta) - T beta_0 / Delta, from beta_t^2 = Delta / T; 220.1 by default."""
        ratio = self.num_steps / self.delta
        return math.sqrt(ratio) - ratio * self.beta_zero

    def r_hat(self, t: float) -> float:
        """r_hat_t = exp(exponent), the lower bound of the magnitude 1 / alpha_bar_t (section 2.2)."""
        return math.exp(self.exponent(t))

    def tau(self, r: float) -> float:
        """tau(r) = sqrt(2 T ln r / Delta + T^2 beta_0^2 / Delta^2) - T beta_0 / Delta (section
        2.5); r >= 1.
        """
        if r < 1:
            raise ValueError(f"r={r:g} must be at least 1: it is the threshold on 1/alpha_bar")
        ratio = self.num_steps / self.delta
        return math.sqrt(2 * ratio * math.log(r) + (ratio * self.beta_zero) ** 2) - (
            ratio * self.beta_zero
        )
