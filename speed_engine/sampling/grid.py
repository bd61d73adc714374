"""The noise levels that a sampler visits, ascending. They come from the schedule as it was configured, and from nothing
that training did to it: a time-step method may have moved the rows of a continuous schedule to where it draws.

In discrete time a level is one of the T time steps. In continuous time it is any point of the schedule's curve: alpha,
sigma, what the network is told and the objective's columns are computed there, not read from a near row. On a schedule
that is sigma alone (EDM, VE) the levels of an ODE sampler are those of Karras et al. (arXiv 2206.00364, equation 5,
rho = 7) from sigma_max to sigma_min; on others even parts of the schedule's own coordinate (t of rectified flow).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from speed_engine.objectives import Objective
from speed_engine.schedules import Schedule, on_curve

Spacing = Literal["auto", "linspace", "leading", "trailing", "karras"]
RHO = 7.0
# alpha_bar of the noisiest level of an ODE sampler: sigma / alpha must be finite, as in diffusers itself.
SMALLEST_ALPHA_BAR = 2.0**-24
# sigma / alpha of the cleanest level: below, 1 - alpha_bar has too few digits left in float64.
SMALLEST_RATIO = 1e-6

ObjectiveOn = Callable[[Schedule], Objective]


@dataclass(frozen=True)
class Levels:
    """S noise levels, ascending, as what a sampler and a network need of each; float64 [S].

    Of the variance-preserving process x / norm with norm^2 = alpha^2 + sigma^2: alpha_bar. The network sees
    input_scale * x, is told `time`, and x0 = of_out * output + of_x * x, with x on that process. place: of the level in
    its schedule, from 0, the cleanest end, up to 1: t / T of a time step, the share of the coordinate's range in
    continuous time.
    """

    alpha_bar: np.ndarray
    time: np.ndarray
    place: np.ndarray
    input_scale: np.ndarray
    of_out: np.ndarray
    of_x: np.ndarray

    @property
    def log_snr(self) -> np.ndarray:
        """ln(alpha^2 / sigma^2); -inf at pure noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)


def levels(
    schedule: Schedule,
    objective_on: ObjectiveOn,
    steps: int,
    spacing: Spacing,
    limit: float,
    shift: float = 1.0,
) -> Levels:
    """The levels of a chain of `steps` steps.

    objective_on: builds the objective on a schedule. limit: levels at which the network's error is magnified more than
    this in x0 are left out (an epsilon model at the end of the cosine schedule). shift: moves even parts of a
    continuous range towards noise, share u to shift u / (1 + (shift - 1) u). Raises ValueError for more steps than
    there are, or a spacing or shift that the schedule has not.
    """
    plain = schedule.unmoved
    told = objective_on(plain).x0_columns(plain)[0].abs() <= limit
    num = int(told.sum())
    if num == 0:
        raise ValueError(
            f"x0 cannot be told at any level of schedule {plain.kind} within a magnification of {limit:g}"
        )
    if shift != 1 and (not plain.continuous or spacing == "karras"):
        raise ValueError(
            f"shift={shift:g} moves even parts of continuous time, and schedule {plain.kind} is sampled at "
            f"{'Karras levels' if plain.continuous else 'numbered steps'}; leave it at 1"
        )
    if plain.curve is None:
        numbers = _numbers(num, steps, spacing)
        chosen, place = _rows(plain, torch.from_numpy(numbers)), numbers / plain.num_rows
    else:
        bottom, top = _ends(plain, objective_on, num, limit)
        chosen = _points(plain, _coordinates(plain, bottom, top, steps, spacing, shift))
        cleanest, noisiest = _edges(plain).numpy()
        place = (chosen.coordinate.numpy() - cleanest) / (noisiest - cleanest)
    objective = objective_on(chosen)
    norm = np.hypot(chosen.alpha.numpy(), chosen.sigma.numpy())
    of_out, of_x = (column.numpy() for column in objective.x0_columns(chosen))
    return Levels(
        alpha_bar=(chosen.alpha.numpy() / norm) ** 2,
        time=chosen.time.numpy(),
        place=place.clip(0, 1),
        input_scale=norm * objective.input_scale.numpy(),
        of_out=of_out,
        of_x=of_x * norm,
    )


def choose_spacing(schedule: Schedule, wanted: Spacing, of_sampler: Spacing) -> Spacing:
    """`wanted`, or for auto the sampler's own, or Karras' levels for an ODE sampler where alpha is 1."""
    if wanted != "auto":
        return wanted
    sigma_alone = schedule.continuous and bool((schedule.alpha == 1).all())
    return "karras" if sigma_alone and of_sampler == "trailing" else of_sampler


# ------------------------------------------------------------------------------------------ discrete time


def _numbers(num: int, steps: int, spacing: Spacing) -> np.ndarray:
    """`steps` different numbers below `num`, ascending, int64 [S]."""
    if steps > num:
        raise ValueError(f"steps={steps} is more than the {num} time steps there are; give fewer")
    if spacing == "karras":
        raise ValueError("spacing=karras needs a continuous schedule; choose another spacing")
    if spacing == "leading":
        kept = np.arange(steps) * (num // steps)
    elif spacing == "linspace" and steps > 1:
        kept = np.linspace(0, num - 1, steps).round()
    else:
        kept = np.sort(np.round(num - np.arange(steps) * (num / steps)) - 1)
    return kept.astype(np.int64)


def _rows(plain: Schedule, at: Tensor) -> Schedule:
    """Some rows of a discrete schedule, which stays the one that constants are taken from."""
    names = ("alpha", "sigma", "coordinate", "measure", "time")
    columns = {name: getattr(plain, name)[at] for name in names}
    return replace(plain, **columns, betas=None, original=plain)


# ---------------------------------------------------------------------------------------- continuous time


def _points(plain: Schedule, at: Tensor) -> Schedule:
    """Points of a continuous schedule's curve, as rows without a width."""
    assert plain.curve is not None
    chosen = on_curve(plain.kind, plain.curve, at, torch.zeros_like(at), plain.sigma_data)
    # The last edge of the cells may lie a rounding error beyond pure noise.
    return replace(chosen, alpha=chosen.alpha.clamp(min=0), original=plain)


def _edges(plain: Schedule) -> Tensor:
    """Both ends of the range that the cells of an unmoved schedule fill; float64 [2]."""
    ends = torch.tensor([0, -1])
    return plain.coordinate[ends] + plain.measure[ends] / 2 * torch.tensor([-1.0, 1.0]).double()


def _ends(
    plain: Schedule, objective_on: ObjectiveOn, num: int, limit: float
) -> tuple[Tensor, Tensor]:
    """The coordinates of the cleanest and the noisiest level: the edges of the range wherever they can be levels."""
    edges = _edges(plain)
    candidates = torch.cat([edges[:1], plain.coordinate[:num]])
    there = _points(plain, candidates)
    bottom = candidates[there.sigma / there.alpha >= SMALLEST_RATIO][0]
    top = plain.coordinate[num - 1]
    if num == plain.num_rows and _tells_x0(_points(plain, edges[1:]), objective_on, limit):
        top = edges[1]
    return bottom, top


def _tells_x0(level: Schedule, objective_on: ObjectiveOn, limit: float) -> bool:
    """Whether the objective is defined there, and says something of x0."""
    try:
        objective = objective_on(level)
    except ValueError:  # epsilon and EDM refuse zero SNR
        return False
    return bool((objective.x0_columns(level)[0].abs() <= limit).all())


def _coordinates(
    plain: Schedule, bottom: Tensor, top: Tensor, steps: int, spacing: Spacing, shift: float
) -> Tensor:
    """The coordinates of the levels; float64 [S], rising."""
    place = torch.arange(steps, dtype=torch.float64)
    both_ends = place / (steps - 1) if steps > 1 else torch.ones_like(place)
    if spacing == "karras":
        return _karras(plain, bottom, top, both_ends)
    if spacing == "trailing":  # the last of S even parts ends at x0 itself, which is no level
        bottom, share = _edges(plain)[0], (place + 1) / steps
    else:
        share = place / steps if spacing == "leading" else both_ends
    share = shift * share / (1 + (shift - 1) * share)
    return bottom * (1 - share) + top * share


def _karras(plain: Schedule, bottom: Tensor, top: Tensor, share: Tensor) -> Tensor:
    """Where sigma / alpha, which rises with the coordinate, is spaced by rho between its ends; found by bisection."""

    def ratio(at: Tensor) -> Tensor:
        level = _points(plain, at)
        return level.sigma / level.alpha

    largest = (1 / SMALLEST_ALPHA_BAR - 1) ** 0.5
    low, high = (float(ratio(end[None])) ** (1 / RHO) for end in (bottom, top))
    wanted = (low * (1 - share) + min(high, largest ** (1 / RHO)) * share) ** RHO
    below, above = bottom.expand_as(share), top.expand_as(share)
    for _ in range(64):
        middle = (below + above) / 2
        under = ratio(middle) < wanted
        below, above = torch.where(under, middle, below), torch.where(under, above, middle)
    return above


# -------------------------------------------------------------------------------------------- for solvers


def strictly_falling(alpha_bar_S: np.ndarray) -> np.ndarray:
    """alpha_bar with what an ODE solver cannot divide by lifted, and no two levels alike.

    Under zero terminal SNR the last levels are 0 or nearly so: a step between equal levels has length 0 in log-SNR,
    and the solver would divide by it. What was below 2^-24 is spread between 2^-25 and just under 2^-24: sigma / alpha
    is then finite and different from level to level in float32, too, which is what diffusers keeps it in.
    """
    low = alpha_bar_S < SMALLEST_ALPHA_BAR
    num = int(low.sum())
    lifted = alpha_bar_S.copy()
    lifted[low] = 0.999 * SMALLEST_ALPHA_BAR * np.exp2(-np.arange(num) / max(num, 1))
    return lifted
