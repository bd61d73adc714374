"""The validation loss: how well held-out samples are denoised, by a measure that no training method can move.

Sample i is put to the network at K fixed rows with fixed noise: (sample, row, noise) depend on the set alone, not on
the run's seed, method, step, number of processes or micro-batches. Rows are equal quantiles of the schedule's own
uniform measure (the step's index; t; ln sigma), shifted from sample to sample so that all together cover it evenly:

    quantile(i, k) = (k + frac((i + 1/2) phi)) / K,     phi = (sqrt 5 - 1) / 2, the golden section

The network's error e on its own target, C x0 + D eps, tells the errors of everything that x_t = A x0 + B eps ties to it
(method: solve A dx0 + B deps = 0, C dx0 + D deps = e):

    dx0 = -B e / (A D - B C)     deps = A e / (A D - B C)     dv = sqrt(A^2 + B^2) e / (A D - B C)

v is that of the variance-preserving form of the process, x_t / sqrt(A^2 + B^2). `validation_loss` is the mean of
deps^2, so that runs of different objectives and methods on one schedule can be compared; the errors by log-SNR, in bins
that are the same for every schedule, compare schedules too. A sample's K errors are averaged before the standard error
is taken.

Shapes: N held-out samples, K rows a sample, B batch, T rows of the table.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speed_engine import kinds
from speed_engine.conditions import Augmenting, Condition, undropped
from speed_engine.config import RunConfig
from speed_engine.data import Batch, Source, order
from speed_engine.data.split import SPLIT_SEED
from speed_engine.diffusion_step import address, losses
from speed_engine.distributed import Processes
from speed_engine.engines import Engine
from speed_engine.objectives import COLUMNS
from speed_engine.step_table import StepTable, build_step_table
from speed_engine.training.assembly import Parts
from speed_engine.training.spikes import EDGES

GOLDEN = (math.sqrt(5) - 1) / 2
BATCH = (
    64  # samples of a forward pass: fixed, so that the sums of products are the same at any split
)


@dataclass(frozen=True)
class Validation:
    """Everything that stays from one measurement to the next.

    network: a copy of the model, whose weights are replaced before every measurement. table: of the run's schedule and
    objective, with the time steps uniform.
    """

    network: nn.Module
    table: StepTable
    source: Source
    conditions: Mapping[str, Condition]
    processes: Processes
    rows: int
    autocast: bool
    backends: Mapping[str, str]
    which: str  # weights: ema or model

    def measure(self, engine: Engine) -> dict[str, Any]:
        """The keys `validation_...` of a line of metrics. Collective.

        validation_loss, validation_x0, validation_v: means of the squared errors, and `..._se`, their standard errors
        over samples. validation_by_log_snr: edges, and for each bin the three means and standard errors and the number
        of (sample, row) pairs; None where it holds none.
        """
        self._take_weights(engine.weights(ema=self.which == "ema"))
        error_NK, row_NK = self.errors()
        return summary(error_NK, row_NK, self.table)

    @torch.no_grad()
    def errors(self) -> tuple[Tensor, Tensor]:
        """(mean squared error of the network on its own target, its row in the table): float64 and int64 [N, K], host.

        Blocks of BATCH samples are dealt out to the processes. Collective.
        """
        row_NK = rows(len(self.source), self.rows, self.table.num_rows)
        error_NK = torch.zeros(row_NK.shape, dtype=torch.float64)
        starts = range(0, len(self.source), BATCH)
        for start in starts[self.processes.rank :: self.processes.world]:
            number_B = torch.arange(start, min(start + BATCH, len(self.source)))
            x0, told = self._read(number_B)
            for k in range(self.rows):
                error_NK[number_B, k] = self._one_pass(x0, told, start, k, row_NK[number_B, k])
        return self.processes.sum(error_NK), row_NK

    def _one_pass(
        self, x0: Tensor, told: dict[str, Tensor], start: int, k: int, row_B: Tensor
    ) -> Tensor:
        """float64 [B] on the host: the network's errors at the rows `row_B`, with the noise of (k, sample)."""
        device = self.processes.device
        batch = Batch(x0, told, address(k, start, device))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            made = losses(
                self.table,
                self.network,
                batch,
                seed=SPLIT_SEED,
                num_slots=len(self.source),
                row_B=row_B.to(device),
                backends=self.backends,
            )
        return made.each_3B[1].double().cpu()

    def _read(self, number_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(x0 in model space, the network's keywords) of held-out samples, unmirrored, no condition dropped."""
        device, facts = self.processes.device, self.source.facts
        stored, arrays = self.source.read(number_B.numpy())
        told: dict[str, Tensor] = {}
        for condition in self.conditions.values():
            told |= (
                condition.null(len(number_B), "cpu")
                if isinstance(condition, Augmenting)
                else condition.drop(arrays, 0, 0, 0)
            )
        normals = None
        if facts.space.posterior:
            at, shape = address(0, int(number_B[0]), device), (len(number_B), *facts.shape)
            normals = order.posterior_normals(0, at, shape, self.backends["noise"])
        x0 = self.source.decode(stored.to(device), normals)
        return x0, {name: value.to(device) for name, value in told.items()}

    @torch.no_grad()
    def _take_weights(self, weights: dict[str, Tensor] | None) -> None:
        """Into every process's copy, from the first one, which alone has them."""
        send = self.processes.broadcast()
        for name, tensor in self.network.state_dict().items():
            if weights is not None:
                tensor.copy_(weights[name])
            if send is not None:
                send(tensor)


def of(parts: Parts) -> Validation | None:
    """What measures the run, from its parts before an engine takes the model; None where nothing is held out."""
    if parts.held_out is None:
        return None
    config, processes = parts.config, parts.processes
    table = build_step_table(
        config.schedule,
        config.objective,
        kinds.config_of("timesteps", "uniform"),
        config.learned_variance,
    )
    return Validation(
        copy.deepcopy(parts.model).eval().requires_grad_(False),
        table.to(processes.device),
        parts.held_out,
        {name: undropped(name, each) for name, each in parts.conditions.items()},
        processes,
        config.validation.rows,
        getattr(config.engine, "precision", "fp32") != "fp32",
        parts.backends,
        config.validation.weights,
    )


def rows(num_samples: int, each: int, num_rows: int) -> Tensor:
    """The fixed rows of every sample; int64 [N, K], each in 0 .. num_rows - 1."""
    shift_N = torch.frac((torch.arange(num_samples, dtype=torch.float64) + 0.5) * GOLDEN)
    quantile_NK = (torch.arange(each, dtype=torch.float64) + shift_N[:, None]) / each
    return (quantile_NK * num_rows).long().clamp(max=num_rows - 1)


def gains(table: StepTable) -> Tensor:
    """float64 [3, T]: the squares of deps / e, dx0 / e and dv / e. Finite, for no target is x_t itself."""
    a, b, c, d = (table.rows_T8[:, COLUMNS.index(name)].double().cpu() for name in "ABCD")
    determinant = a * d - b * c
    return torch.stack([a, b, (a.square() + b.square()).sqrt()]).div(determinant).square()


def summary(error_NK: Tensor, row_NK: Tensor, table: StepTable) -> dict[str, Any]:
    """See `Validation.measure`."""
    errors_3NK = error_NK * gains(table)[:, row_NK]
    line: dict[str, Any] = {}
    for name, each_NK in zip(("loss", "x0", "v"), errors_3NK, strict=True):
        mean, spread = _mean_and_error(each_NK.mean(1))
        line |= {f"validation_{name}": mean, f"validation_{name}_se": spread}
    log_snr_T = table.schedule.log_snr.clamp(-1e9, 1e9)
    bin_NK = torch.bucketize(log_snr_T[row_NK], EDGES[1:-1])
    by_bin: dict[str, Any] = {"edges": EDGES.tolist(), "count": []}
    for number in range(len(EDGES) - 1):
        inside_NK = bin_NK == number
        by_bin["count"].append(int(inside_NK.sum()))
        has_N = inside_NK.any(1)
        for name, each_NK in zip(("eps", "x0", "v"), errors_3NK, strict=True):
            kept_NK = torch.where(inside_NK, each_NK, 0.0)[has_N]
            mean, spread = _mean_and_error(kept_NK.sum(1) / inside_NK[has_N].sum(1))
            by_bin.setdefault(name, []).append(mean)
            by_bin.setdefault(f"{name}_se", []).append(spread)
    return line | {"validation_by_log_snr": by_bin}


def _mean_and_error(value_N: Tensor) -> tuple[float | None, float | None]:
    """Mean and standard error; None where there are too few."""
    count = len(value_N)
    mean = float(value_N.mean()) if count else None
    return mean, float(value_N.std()) / math.sqrt(count) if count > 1 else None


def share_of_training(config: RunConfig) -> float:
    """Forward passes of validation over those of training, a backward pass counted as two; 0 where it is off."""
    settings = config.validation
    if not settings.every:
        return 0.0
    return settings.samples * settings.rows / (3 * settings.every * config.train.global_batch)
