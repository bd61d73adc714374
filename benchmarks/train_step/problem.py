"""The cases of the training-step benchmark: sizes, latents, labels, seeded weights, and memory that rivals share.

Two training states of DiT-XL/2 are 22 GB. The rivals therefore work on ONE set of float32 weights, moments and EMAs,
and take its memory from our engines' optimizers, where these have it: the same bytes, written by whoever runs. Nobody's
speed depends on the values; before a rival's gate they are set anew.
"""

# Shape suffixes: B samples, T time steps.

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from speed_kernels import philox
from speed_kernels.table import epsilon
from torch import Tensor

from benchmarks.ops.diffusion_step.formulas import HostTables, host_tables, uniform_cdf
from benchmarks.report.predictions import LATENT, NUM_CLASSES, Work
from benchmarks.train_step import plain_dit
from benchmarks.train_step.losses import Draw
from speed_engine.models import dit

SEED = 7
LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.0
DECAY = 0.9  # of the EMA, small so that the gate sees it move in three steps; it costs what 0.9999 costs
SPREAD = 0.02  # standard deviation of all weights: adaLN's too, or an untrained network would be the identity
LABEL_DROPOUT = 0.1
EMA_STATE = ("exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class TrainCase:
    """A network and a batch of one process, on the device types where it is measured."""

    name: str
    size: str
    batch: int
    devices: tuple[str, ...]
    sample_size: int = LATENT[1]

    @property
    def work(self) -> Work:
        return Work(self.size, self.batch, self.sample_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one sample."""
        return (LATENT[0], self.sample_size, self.sample_size)

    @property
    def network(self) -> dict[str, Any]:
        """What `plain_dit` is told."""
        facts = {"channels": LATENT[0], "sample_size": self.sample_size, "num_classes": NUM_CLASSES}
        return {"size": dit.SIZES[self.size], **facts}


CASES = (
    TrainCase("S2-b16", "S/2", 16, ("cpu",)),
    TrainCase("XL2-b4", "XL/2", 4, ("cpu",)),
    *(
        TrainCase(f"{size.replace('/', '')}-b{batch}", size, batch, ("cuda",))
        for size in ("S/2", "B/2", "XL/2")
        for batch in (32, 256)
    ),
)
QUICK = (TrainCase("tiny-b4", "tiny/2", 4, ("cpu", "cuda"), sample_size=8),)


@dataclass(frozen=True)
class Problem:
    """The batch that every provider trains on: x0 float32 [B, C, H, W] of N(0, 1), labels int64 [B]."""

    case: TrainCase
    device: torch.device
    x0: Tensor
    labels_B: Tensor
    tables: HostTables = field(default_factory=host_tables, repr=False)

    def gate_draw(self, step: int) -> Draw:
        """The time steps and the noise that our engine draws in `step`: everybody's in the gate."""
        address_2 = torch.tensor([step, 0], device=self.device)
        slot_B = torch.arange(self.case.batch, device=self.device)
        cdf_T = uniform_cdf(self.tables.num_rows).to(self.device)
        t_B = philox.row_draw(SEED, address_2[0], slot_B, cdf_T, self.case.batch, False)
        eps = epsilon(self.x0.shape, address_2, SEED).float()
        return Draw(t_B, eps, (t_B.cpu() == 0).nonzero().flatten())


def make_problem(case: TrainCase, device: torch.device) -> Problem:
    """Latents and labels of a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    x0 = torch.randn((case.batch, *case.shape), generator=generator)
    labels_B = torch.randint(0, NUM_CLASSES, (case.batch,), generator=generator)
    return Problem(case, device, x0.to(device), labels_B.to(device))


@torch.no_grad()
def seed_weights(named: Iterable[tuple[str, Tensor]]) -> None:
    """N(0, SPREAD^2) for every tensor, in place, from its name and device alone."""
    for name, tensor in named:
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
        tensor.normal_(0.0, SPREAD, generator=generator)


def seeded(name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """What `seed_weights` gives a tensor."""
    tensor = torch.empty(tuple(shape), device=device)
    seed_weights([(name, tensor)])
    return tensor


# ------------------------------------------------------------------ shared memory


class Arena:
    """Buffers of optimizers in which others may work as well: weights, moments, squares, EMAs, flat, of one length."""

    def __init__(self) -> None:
        self._chunks: list[list[Any]] = []  # [elements taken, four flat tensors]

    def donate(self, optimizer: torch.optim.Optimizer) -> None:
        """Offer the state of every float32 tensor that `optimizer` has stepped; others are passed over."""
        for group in optimizer.param_groups:
            for param in group["params"]:
                state = optimizer.state.get(param) or {}
                buffers = [param.detach(), *(state.get(key) for key in EMA_STATE)]
                if all(_lendable(each, param) for each in buffers):
                    self._chunks.append([0, tuple(each.view(-1) for each in buffers)])

    def take(self, numel: int) -> tuple[Tensor, ...] | None:
        """Four flat tensors of `numel` elements, in the tightest place; None if there is none."""
        fitting = [chunk for chunk in self._chunks if chunk[1][0].numel() - chunk[0] >= numel]
        if not fitting:
            return None
        chunk = min(fitting, key=lambda each: each[1][0].numel() - each[0])
        start = chunk[0]
        chunk[0] += -(-numel // 16) * 16  # wide accesses like it
        return tuple(buffer[start : start + numel] for buffer in chunk[1])


def _lendable(buffer: Any, param: Tensor) -> bool:
    return (
        isinstance(buffer, Tensor)
        and buffer.dtype == torch.float32
        and buffer.numel() == param.numel()
        and buffer.is_contiguous()
    )


@dataclass(frozen=True)
class State:
    """Float32 weights, moments and EMAs of all plain rivals, by name. `own_bytes`: what is not borrowed."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    squares: dict[str, Tensor]
    emas: dict[str, Tensor]
    own_bytes: int

    @torch.no_grad()
    def reset(self, rounded: bool = False) -> None:
        """Weights as seeded, or those rounded to bfloat16; no moments, EMAs at the weights."""
        seed_weights(self.weights.items())
        for name, weight in self.weights.items():
            if rounded:
                weight.copy_(weight.bfloat16())
            self.moments[name].zero_()
            self.squares[name].zero_()
            self.emas[name].copy_(weight)


def make_state(shapes: Mapping[str, torch.Size], device: torch.device, arena: Arena) -> State:
    """Room for all tensors of `shapes`: in the arena where it is, else new. The values are undefined."""
    own_bytes = 0
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, shape in sorted(shapes.items(), key=lambda item: -item[1].numel()):
        buffers = arena.take(shape.numel())
        if buffers is None:
            buffers = tuple(torch.empty(shape.numel(), device=device) for _ in range(4))
            own_bytes += 16 * shape.numel()
        found[name] = tuple(buffer.view(shape) for buffer in buffers)
    columns = [{name: found[name][index] for name in shapes} for index in range(4)]
    return State(*columns, own_bytes=own_bytes)


def shapes_of(case: TrainCase) -> dict[str, torch.Size]:
    """Name -> shape of the trained tensors, the same for every provider."""
    return plain_dit.shapes(**case.network)
