"""Methods that change while training runs: one interface for schedules in time, for learned weights
and for adaptive densities.

An `Online` part lives on the device. Every `every` steps the step table hands it all observations
of the global batch since the last time (the same on every rank, ordered by step and slot) and it
returns a new density, a new weight, or neither. It never reads a number back to the host, so
nothing waits. Its whole state is a dictionary of tensors.

Shape legend: T rows of the table, N observations (steps x global batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Observations(NamedTuple):
    """Per-sample losses of the global batch since the last refresh; rows that nobody filled have
    `seen` False.
    """

    row_N: Tensor  # int64, 0 where unseen
    mse_N: Tensor  # float64, unweighted mean squared error on the objective's own target
    vb_N: Tensor  # float64, variational term in bits; zero without a learned variance
    seen_N: Tensor  # bool
    num_steps: int  # length of the interval

    def sums(self, value_N: Tensor, group_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """(sum of `value_N`, number of observations) in each group; float64 [num_groups], unseen
        ones left out.

        Added as integers of 2^-28, so that the order of the sum, which differs between devices, has
        no effect.
        """
        fixed_N = (value_N.clamp(0, 2.0**14) * 2**28).round().long() * self.seen_N
        total = torch.zeros(num_groups, dtype=torch.int64, device=value_N.device)
        count = torch.zeros_like(total)
        total.index_add_(0, group_N, fixed_N)
        count.index_add_(0, group_N, self.seen_N.long())
        return total.double() / 2**28, count.double()


@dataclass
class Columns:
    """What a part may know about the table it belongs to; float64 [T] on the device."""

    density_T: Tensor  # the part's density at the start
    weight_T: Tensor  # the part's weight at the start, on the objective's own target
    total_weight_T: Tensor  # the whole method's
    gain_T: Tensor  # d target / d x0
    eps_gain_T: Tensor  # |d eps / d x0| = alpha / sigma
    log_snr_T: Tensor
    measure_T: Tensor  # width of a row's cell in the training coordinate


class Online:
    """Base of all parts that change. `every`: steps between refreshes; `needs_losses`: whether it
    learns from them.
    """

    every: int = 1
    needs_losses: bool = True

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        """Allocate the state on the device of `columns`; `shape` is a sample's. Called once."""
        raise NotImplementedError

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        """(new density, new own-target weight), float64 [T] each or None, after `step` finished
        steps.

        The density need not be normalised. Device work only. May be called more often than `every`
        asks for, when it is combined with a part of another interval.
        """
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The state, by name: the live tensors, written in place when a run resumes."""
        raise NotImplementedError


def bins(num_rows: int, num_bins: int, device: torch.device) -> Tensor:
    """The bin of every row when `num_bins` bins share the rows evenly; int64 [T]."""
    return torch.arange(num_rows, device=device) * num_bins // num_rows
