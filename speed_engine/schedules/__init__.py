"""Noise schedules: one file a family, all of them become one `Schedule`.

A schedule is a table of the forward process x = alpha * x0 + sigma * eps, one row a time step, from
clean (row 0) to noisy (last row), in float64. A discrete schedule has its betas; a continuous one
has a `curve` (coordinate -> alpha, sigma, time) and its rows are the middles of cells of the
training coordinate, so that everything downstream sees rows only. The word `schedule.kind` of a
configuration is the name of a file of this folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.kinds import Section

# Rows of a continuous schedule: enough that a cell is far narrower than anything a network
# resolves.
NUM_CELLS = 16384

Curve = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class DiscreteConfig(Section):
    """What every schedule made of betas can be told."""

    num_steps: int = Field(1000, ge=2, le=2**20, description="T, the number of time steps")
    zero_terminal_snr: bool = Field(
        False,
        description="rescale so that the last step is pure noise (Lin et al. 2024, algorithm 1)",
    )


@dataclass(frozen=True)
class Schedule:
    """One forward process as float64 columns of T rows, ordered by rising noise.

    `coordinate` is the variable that training draws uniformly by default (the step's index; t; ln
    sigma), `measure` the width of each row's cell in it, `time` what the network is told.
    `sigma_data` is the standard deviation of x0 that SNR counts with (1 for the DDPM family, 0.5
    for EDM).
    """

    kind: str
    alpha: Tensor
    sigma: Tensor
    coordinate: Tensor
    measure: Tensor
    time: Tensor
    betas: Tensor | None = None
    sigma_data: float = 1.0
    curve: Curve | None = None
    original: Schedule | None = None  # whose rows `equal_mass` moved

    @property
    def unmoved(self) -> Schedule:
        """The schedule as it was configured: what a sampler visits and a constant is taken from."""
        return self if self.original is None else self.original

    @property
    def num_rows(self) -> int:
        """T, or the number of cells of a continuous schedule."""
        return self.alpha.numel()

    @property
    def continuous(self) -> bool:
        """Whether time is continuous: rows are then cells, and can be placed elsewhere on the
        curve.
        """
        return self.curve is not None

    @property
    def snr(self) -> Tensor:
        """Signal to noise ratio (sigma_data * alpha / sigma)^2; float64 [T], 0 where alpha is 0."""
        return (self.sigma_data * self.alpha / self.sigma).square()

    @property
    def log_snr(self) -> Tensor:
        """ln SNR; float64 [T], -inf where alpha is 0."""
        return self.snr.log()

    @property
    def noise_fraction(self) -> Tensor:
        """u = sigma^2 / (sigma^2 + (sigma_data * alpha)^2) = 1 / (1 + SNR), in (0, 1]: free of
        scale.
        """
        return self.sigma.square() / (self.sigma.square() + (self.sigma_data * self.alpha).square())

    @property
    def alpha_bar(self) -> Tensor:
        """1 - u = SNR / (1 + SNR): DDPM's alpha_bar, and its counterpart on every other schedule."""
        signal = (self.sigma_data * self.alpha).square()
        return signal / (self.sigma.square() + signal)

    @property
    def noise_rate(self) -> Tensor:
        """du / d coordinate; float64 [T].

        In discrete time central differences, one-sided at both ends. In continuous time the curve's
        own derivative at each row, whose cell may be wide: central differences within 1e-4 of the
        range, and within the cell.
        """
        if self.curve is None:
            (rate,) = torch.gradient(self.noise_fraction, spacing=(self.coordinate,))
            return rate
        half = (self.measure / 2).clamp(max=1e-4 * float(self.measure.sum()))
        u = [
            on_curve(self.kind, self.curve, at, self.measure, self.sigma_data).noise_fraction
            for at in (self.coordinate + half, self.coordinate - half)
        ]
        return (u[0] - u[1]) / (2 * half)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """Smallest and largest sigma / alpha of the schedule as configured: of its rows in discrete
        time, of the whole range in continuous time.
        """
        plain = self.unmoved
        ratio = plain.sigma / plain.alpha
        if plain.curve is not None:
            edges = plain.coordinate[[0, -1]] + plain.measure[[0, -1]] / 2 * torch.tensor([-1, 1])
            alpha, sigma, _ = plain.curve(edges)
            ratio = torch.cat([ratio, sigma / alpha])
        return float(ratio.min()), float(ratio.max())

    @property
    def uniform(self) -> Tensor:
        """The density over the rows that is uniform in the coordinate; float64 [T], sums to one."""
        return self.measure / self.measure.sum()

    @property
    def share_edges(self) -> Tensor:
        """The edges of the rows' cells as shares of the coordinate's range; float64 [T+1], 0 to 1."""
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), self.measure.cumsum(0)])
        return sums / sums[-1]

    def first_row(self, r: float) -> int:
        """First row with 1 / alpha_bar >= r: where the convergence area of magnitude r begins (r >
        1).

        Equivalent to SNR <= 1 / (r - 1). Raises ValueError where the schedule never gets there.
        """
        if not r > 1:
            raise ValueError(f"r={r:g} must be above 1: it is the threshold on 1/alpha_bar")
        alpha_bar = self.alpha_bar
        reached = torch.nonzero(alpha_bar * r <= 1)
        if reached.numel() == 0:
            largest = 1 / alpha_bar[-1].item()
            raise ValueError(
                f"schedule {self.kind} never reaches r={r:g}: 1/alpha_bar ends at {largest:.4g}; "
                "choose a smaller r or give the threshold as tau"
            )
        return int(reached[0].item())

    def equal_mass(self, density: Tensor) -> Schedule:
        """The same curve with its rows moved to the middles of T cells of equal mass of `density`.

        `density` is over the present rows, whose cells must adjoin. Continuous schedules only.
        """
        assert self.curve is not None
        start = self.coordinate[0] - self.measure[0] / 2
        edges = torch.cat([start[None], start + self.measure.cumsum(0)])
        mass = torch.cat([torch.zeros(1, dtype=torch.float64), density.double().cumsum(0)])
        levels = torch.arange(2 * self.num_rows + 1, dtype=torch.float64) / (2 * self.num_rows)
        points = interpolate(levels * mass[-1], mass, edges)
        moved = on_curve(
            self.kind, self.curve, points[1::2], points[2::2] - points[:-2:2], self.sigma_data
        )
        return replace(moved, original=self.unmoved)


def scaled_beta(beta: float, num_steps: int) -> float:
    """A beta chosen for 1000 steps, for a chain of `num_steps` that adds as much noise in all."""
    return min(beta * 1000 / num_steps, 0.999)


def from_betas(kind: str, betas: Tensor, zero_terminal_snr: bool = False) -> Schedule:
    """The discrete variance-preserving schedule of `betas` (float64 [T], each in (0, 1)); time is
    the 0-based index.
    """
    betas = betas.double()
    if betas.ndim != 1 or betas.numel() < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"schedule {kind}: betas must be a list of at least 2 numbers in (0, 1); change "
            "beta_start, beta_end or num_steps"
        )
    alpha_bar = (1 - betas).cumprod(0)
    if zero_terminal_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return _discrete(kind, alpha_bar, betas)


def from_alphas_cumprod(alphas_cumprod: Tensor, kind: str = "alphas_cumprod") -> Schedule:
    """The discrete schedule of somebody else's alpha_bar: [T], falling, in [0, 1) with only the
    last one allowed to be 0.
    """
    alpha_bar = torch.as_tensor(alphas_cumprod).detach().cpu().double()
    falling = alpha_bar.ndim == 1 and alpha_bar.numel() >= 2 and bool((alpha_bar.diff() < 0).all())
    if not falling or not (alpha_bar[-1] >= 0 and alpha_bar[-2] > 0 and alpha_bar[0] < 1):
        raise ValueError(
            "alphas_cumprod must be a one-dimensional falling list in (0, 1), from clean to noisy; "
            "pass scheduler.alphas_cumprod as it is"
        )
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return _discrete(kind, alpha_bar, 1 - alpha_bar / previous)


def from_sigmas(sigmas: Tensor, sigma_data: float = 0.5) -> Schedule:
    """The rows x0 + sigma eps at given noise levels: [T] in any order, positive; time is ln(sigma) /
    4 (EDM's c_noise).
    """
    sigma = torch.as_tensor(sigmas).detach().cpu().double().flatten().sort().values
    if sigma.numel() < 2 or not sigma[0] > 0 or not torch.isfinite(sigma).all():
        raise ValueError(
            "sigmas must be at least 2 positive numbers; leave out the final 0 of a sampler's list"
        )
    index = torch.arange(sigma.numel(), dtype=torch.float64)
    one = torch.ones_like(sigma)
    return Schedule("sigmas", one, sigma, index, one, sigma.log() / 4, sigma_data=sigma_data)


def from_flow(times: Tensor | None, time_scale: float = 1000.0) -> Schedule:
    """Rectified flow x = (1 - t) x0 + t eps: at given times ([T] in (0, 1], any order), or in
    continuous time.

    time is time_scale * t.
    """
    if times is None:
        return on_curve("rectified_flow", flow_curve(1.0, time_scale), *cells(0.0, 1.0))
    t = torch.as_tensor(times).detach().cpu().double().flatten().sort().values
    if t.numel() < 2 or not t[0] > 0 or t[-1] > 1:
        raise ValueError(
            "times must be at least 2 numbers in (0, 1]; leave out the final 0 of a sampler's list"
        )
    index = torch.arange(t.numel(), dtype=torch.float64)
    return Schedule("flow_times", 1 - t, t, index, torch.ones_like(t), time_scale * t)


def flow_curve(shift: float, time_scale: float) -> Curve:
    """t -> alpha, sigma, time of rectified flow after the resolution shift t' = s t / (1 + (s - 1)
    t) (Esser et al. 2024). Like every curve it can be pickled, and with it a table.
    """
    return functools.partial(_flow, shift, time_scale)


def _flow(shift: float, time_scale: float, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shifted = shift * t / (1 + (shift - 1) * t)
    return 1 - shifted, shifted, time_scale * shifted


def on_curve(
    kind: str, curve: Curve, coordinate: Tensor, measure: Tensor, sigma_data: float = 1.0
) -> Schedule:
    """A continuous schedule whose rows are the points `coordinate` (float64 [N], rising) of
    `curve`.
    """
    alpha, sigma, time = curve(coordinate)
    return Schedule(
        kind, alpha, sigma, coordinate, measure, time, sigma_data=sigma_data, curve=curve
    )


def cells(start: float, end: float, num: int = NUM_CELLS) -> tuple[Tensor, Tensor]:
    """Middles and widths of `num` equal cells of [start, end]; float64 [num] each."""
    width = (end - start) / num
    middles = start + (torch.arange(num, dtype=torch.float64) + 0.5) * width
    return middles, torch.full_like(middles, width)


def _discrete(kind: str, alpha_bar: Tensor, betas: Tensor) -> Schedule:
    index = torch.arange(alpha_bar.numel(), dtype=torch.float64)
    return Schedule(
        kind,
        alpha=alpha_bar.sqrt(),
        sigma=(1 - alpha_bar).sqrt(),
        coordinate=index,
        measure=torch.ones_like(index),
        time=index,
        betas=betas,
    )


def interpolate(x: Tensor, x_known: Tensor, y_known: Tensor) -> Tensor:
    """Piecewise linear y(x); `x_known` non-decreasing."""
    right = torch.searchsorted(x_known, x).clamp(1, x_known.numel() - 1)
    x0, x1 = x_known[right - 1], x_known[right]
    share = ((x - x0) / (x1 - x0).clamp_min(torch.finfo(torch.float64).tiny)).clamp(0, 1)
    return y_known[right - 1] + share * (y_known[right] - y_known[right - 1])
