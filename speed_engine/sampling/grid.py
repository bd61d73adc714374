"""The noise levels that a sampler visits: rows of the schedule as it was configured, ascending.

A time-step method may have moved the rows of a continuous schedule to where training draws (`Schedule.equal_mass`);
sampling takes `Schedule.unmoved`. On a schedule that is sigma alone (EDM, VE) the levels of an ODE sampler are those
of Karras et al. (arXiv 2206.00364, equation 5, rho = 7), on others the step's index or t in even parts.
"""

from __future__ import annotations

import numpy as np

from speed_engine.schedules import Schedule

RHO = 7.0
# alpha_bar of the noisiest level of an ODE sampler: sigma / alpha must be finite, as in diffusers itself.
SMALLEST_ALPHA_BAR = 2.0**-24
SPACINGS = ("auto", "linspace", "leading", "trailing", "karras")


def rows(
    schedule: Schedule, magnification_T: np.ndarray, steps: int, spacing: str, limit: float
) -> np.ndarray:
    """`steps` different rows of the schedule, int64 [S], ascending. Raises ValueError for more than there are.

    magnification_T: |a| of x0 = a out + b x; rows where it is over `limit` are left out: an ODE solver must not start
    where the network's error is magnified beyond sense (an epsilon model at the end of the cosine schedule).
    """
    num = int(np.sum(magnification_T <= limit))
    if steps > num:
        raise ValueError(f"steps={steps} is more than the {num} time steps there are; give fewer")
    if spacing == "karras":
        return _karras(schedule, num, steps)
    if spacing == "leading":
        kept = np.arange(steps) * (num // steps)
    elif spacing == "linspace" and steps > 1:
        kept = np.linspace(0, num - 1, steps).round()
    else:
        kept = np.sort(np.round(num - np.arange(steps) * (num / steps)) - 1)
    return kept.astype(np.int64)


def choose_spacing(schedule: Schedule, wanted: str, of_sampler: str) -> str:
    """`wanted`, or for auto the sampler's own, or Karras' levels for an ODE sampler where alpha is 1."""
    if wanted != "auto":
        return wanted
    sigma_alone = schedule.continuous and bool((schedule.alpha == 1).all())
    return "karras" if sigma_alone and of_sampler == "trailing" else of_sampler


def _karras(schedule: Schedule, num: int, steps: int) -> np.ndarray:
    """The rows nearest to rho-spaced levels of sigma / alpha between the first and the last of `num` rows."""
    ratio = (schedule.sigma / schedule.alpha).numpy()[:num]
    top, bottom = float(ratio[-1] ** (1 / RHO)), float(ratio[0] ** (1 / RHO))
    wanted = np.linspace(top, bottom, steps) ** RHO
    above = np.searchsorted(np.log(ratio), np.log(wanted)).clip(1, num - 1)
    nearer_below = wanted < np.sqrt(ratio[above - 1] * ratio[above])
    kept = np.sort(above - nearer_below)
    # Many steps on few rows: no row twice.
    places = np.arange(steps)
    kept = np.maximum.accumulate(kept - places) + places
    return np.minimum(kept, num - steps + places).astype(np.int64)


def strictly_falling(alpha_bar_S: np.ndarray) -> np.ndarray:
    """alpha_bar with what an ODE solver cannot divide by lifted, and no two levels alike.

    Under zero terminal SNR the last rows are 0 or nearly so: a step between equal levels has length 0 in log-SNR,
    and the solver would divide by it.
    """
    low = alpha_bar_S < SMALLEST_ALPHA_BAR
    lifted = alpha_bar_S.copy()
    lifted[low] = SMALLEST_ALPHA_BAR * 0.9 ** np.arange(1, int(low.sum()) + 1)
    return lifted
