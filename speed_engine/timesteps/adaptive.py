"""Adaptive non-uniform sampling (Kim et al. 2025, CVPR): a policy learns which time steps make the
network better.

A small network maps each clean sample to a Beta distribution over time steps, from which its step
is drawn. Every `every` updates the reward of a sample is measured: how much the update lowered its
single-step KL divergence (fixed large variance, in bits) at a few selected steps S. The policy
follows the reward by REINFORCE. S are the steps whose change best predicts the change at all steps:
every `sweep_every` updates one sample is measured at a grid of all steps, and an F statistic over
the last sweeps chooses.

From the released code: |S| = 3, 20 sweeps remembered, every 40 updates, learning rate 1e-2,
gradient clip 1, entropy 0.01. Changed for cost and noise: the same eps before and after the update;
sweeps every 200 updates on every 8th step (the release sweeps all 1000 every 40, 36 % extra work at
batch 64; this is about 6 %); a running mean as baseline and a running scale, so that the entropy
bonus does not depend on the reward's unit, and the bonus not multiplied into the reward; S starts
evenly spread, not at 0, 1, 2; any sample shape; discrete or continuous time. As there, nothing
corrects for the changed density unless `corrected`, which weighs by 1 / (T p) with p the policy's
mean over the last batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from speed_engine.schedules import Schedule
from speed_engine.timesteps import Method, MethodConfig
from speed_engine.timesteps.online import Columns, Observations
from speed_engine.timesteps.online.adam import Adam
from speed_engine.timesteps.online.beta_policy import BetaPolicy
from speed_engine.timesteps.online.feature_selection import FeatureSelection
from speed_engine.timesteps.online.policy import Evaluate, Policy, Reach

MAX_SLOTS = 2**20  # evaluations of different ranks get different noise


class Config(MethodConfig):
    """`timesteps.kind: adaptive`."""

    kind: Literal["adaptive"] = "adaptive"
    every: int = Field(40, ge=1, description="training steps between two lessons of the policy")
    sweep_every: int = Field(200, ge=1, description="training steps between two sweeps; a multiple")
    sweep_rows: int = Field(125, ge=4, description="steps that a sweep measures, evenly spread")
    num_selected: int = Field(3, ge=1, description="|S|, steps that the reward is measured at")
    num_sweeps: int = Field(20, ge=3, description="sweeps that the selection remembers")
    lr: float = Field(1e-2, gt=0, description="learning rate of the policy")
    clip: float = Field(1.0, gt=0, description="largest norm of the policy's gradient")
    entropy: float = Field(0.01, ge=0, description="bonus of the policy's entropy")
    baseline_decay: float = Field(0.9, ge=0, lt=1, description="of the running mean reward")
    corrected: bool = Field(False, description="weigh by 1/(T p)")


def build(config: Config, schedule: Schedule) -> Method:
    """Starts nearly uniform. Raises ValueError for numbers that do not fit together."""
    if config.sweep_every % config.every:
        raise ValueError(
            f"timesteps.sweep_every={config.sweep_every} must be a multiple of "
            f"timesteps.every={config.every}"
        )
    num_swept = min(config.sweep_rows, schedule.num_rows)
    if config.num_selected > num_swept:
        raise ValueError(
            f"timesteps.num_selected={config.num_selected} is above the {num_swept} steps of a sweep"
        )
    one = torch.ones_like(schedule.alpha)
    return Method(schedule.uniform, one, online=Sampler(config, bits_per_error(schedule)))


def bits_per_error(schedule: Schedule) -> Tensor:
    """Bits of a step's KL divergence per mean squared error of x0; float64 [T].

    In discrete time q(x_{t-1}|x_t, x0) against the model's with the fixed large variance: (posterior's
    factor of x0)^2 / (2 variance ln 2), the variance being beta_t, and at t = 0 the posterior's of t = 1
    (as in the authors' code, which takes the KL there too). In continuous time half the step's loss of
    SNR, the limit of the same.
    """
    if schedule.betas is None:
        lost = -schedule.snr.diff(append=schedule.snr[-1:])
        return lost.clamp(min=0) / schedule.sigma_data**2 / (2 * math.log(2))
    alpha_bar = schedule.alpha.square()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    bits = schedule.betas * previous / (1 - alpha_bar).square() / (2 * math.log(2))
    posterior = schedule.betas[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    bits[0] *= schedule.betas[0] / posterior
    return bits


@dataclass
class Lesson:
    """What is measured before an update and compared after it."""

    x0: Tensor
    conditions: Mapping[str, Tensor]
    row_B: Tensor
    selected_S: Tensor  # rows
    sample: tuple[Tensor, dict[str, Tensor]] | None  # what a sweep looks at, where one is due
    error_SB: Tensor = field(default_factory=lambda: torch.zeros(()))
    sweep_R: Tensor = field(default_factory=lambda: torch.zeros(()))


def _first_sample(
    x0: Tensor, conditions: Mapping[str, Tensor], reach: Reach
) -> tuple[Tensor, dict[str, Tensor]]:
    """The first sample of rank 0's batch, on every rank: (x0 [1, ...], its conditions [1, ...])."""
    share = 1.0 if reach.rank == 0 else 0.0
    firsts = [x0[:1], *(value[:1] for value in conditions.values())]
    packed = torch.cat([first.double().flatten() for first in firsts]) * share
    if reach.all_reduce is not None:
        reach.all_reduce(packed)
    pieces = packed.split([first.numel() for first in firsts])
    image, *values = (  # float64 holds every integer below 2^53
        piece.view_as(first).to(first.dtype) for piece, first in zip(pieces, firsts, strict=True)
    )
    return image, dict(zip(conditions, values, strict=True))


class Sampler(Policy):
    """The policy network, its optimizer, the selection of steps and the running baseline."""

    needs_losses = False

    def __init__(self, config: Config, bits_T: Tensor) -> None:
        self.config, self.every, self.bits_T = config, config.every, bits_T
        self.lesson: Lesson | None = None

    def start(self, columns: Columns, shape: tuple[int, ...]) -> None:
        if not shape:
            raise ValueError(
                "timesteps.kind=adaptive needs the shape of a sample; call table.start(num_slots, shape)"
            )
        config, device = self.config, columns.density_T.device
        num_rows = columns.density_T.numel()
        # Per error of the objective's own target.
        self.bits_T = self.bits_T.to(device) / columns.gain_T.square()
        self.uniform_T = columns.measure_T / columns.measure_T.sum()
        self.network = BetaPolicy(shape, num_rows).to(device)
        self.parameters = list(self.network.parameters())
        flat = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.data = piece.view_as(parameter)  # the network sees what the optimizer writes
        self.adam = Adam(flat, config.lr)
        num_swept = min(config.sweep_rows, num_rows)
        self.swept_R = torch.arange(num_swept, device=device) * num_rows // num_swept
        self.selection = FeatureSelection(num_swept, config.num_selected, config.num_sweeps, device)
        # Running mean and mean square of the reward, and how many lessons they have seen.
        self.reward_3 = torch.zeros(3, dtype=torch.float64, device=device)
        self.mean_density_T = columns.density_T.clone()

    def draw(self, x0: Tensor, word_B: Tensor) -> Tensor:
        with torch.no_grad():
            mass_BT = (self.network(x0.float()).exp() * 2**30).round().long()
        # Integers, so that a draw never depends on the order of a sum.
        cdf_BT = mass_BT.cumsum(dim=1)
        point_B1 = (word_B[:, None] * cdf_BT[:, -1:]) >> 32
        return torch.searchsorted(cdf_BT, point_B1, right=True).squeeze(1)

    def due(self, step: int) -> bool:
        return step % self.every == 0

    # ---------------------------------------------------------------- around an update

    def before(
        self,
        step: int,
        x0: Tensor,
        conditions: Mapping[str, Tensor],
        row_B: Tensor,
        evaluate: Evaluate,
        reach: Reach,
    ) -> None:
        selected_S = self.swept_R[self.selection.best]
        sample = (
            _first_sample(x0, conditions, reach) if step % self.config.sweep_every == 0 else None
        )
        lesson = Lesson(x0, conditions, row_B, selected_S, sample)
        lesson.error_SB = self._selected(lesson, evaluate, reach)
        lesson.sweep_R = self._sweep(lesson, evaluate, reach)
        self.lesson = lesson

    def after(self, evaluate: Evaluate, reach: Reach) -> None:
        lesson, self.lesson = self.lesson, None
        assert lesson is not None
        change_SB = lesson.error_SB - self._selected(lesson, evaluate, reach)
        reward_B = (self.bits_T[lesson.selected_S][:, None] * change_SB).sum(dim=0)
        swept_R = lesson.sweep_R - self._sweep(lesson, evaluate, reach)
        gradient, density_T = self._gradient(lesson, reward_B)
        # One sum over the ranks for all of it.
        moments = torch.stack([reward_B.mean(), reward_B.square().mean()])
        packed = torch.cat([gradient.double(), density_T, moments])
        packed = torch.cat([packed / reach.num_ranks, swept_R])
        if reach.all_reduce is not None:
            reach.all_reduce(packed)
        # A lesson with a broken loss teaches nothing; every rank sees the same sum.
        fine = packed.isfinite().all()
        sizes = [gradient.numel(), density_T.numel(), 2, swept_R.numel()]
        gradient, density_T, moments, swept_R = packed.nan_to_num(0, 0, 0).split(sizes)
        self._learn(gradient.float() * fine, torch.where(fine, moments, self.reward_3[:2]))
        self.mean_density_T.copy_(torch.where(fine, density_T, self.mean_density_T))
        if lesson.sample is not None:
            self.selection.add(swept_R * fine)

    def refresh(self, step: int, seen: Observations) -> tuple[Tensor | None, Tensor | None]:
        """Only for the report, and for the correction: the draw itself looks at each sample."""
        weight_T = self.uniform_T / self.mean_density_T if self.config.corrected else None
        return self.mean_density_T, weight_T

    def _selected(self, lesson: Lesson, evaluate: Evaluate, reach: Reach) -> Tensor:
        """Errors of the batch at the selected steps; float64 [S, B]."""
        batch = lesson.x0.shape[0]
        errors = [
            evaluate(
                lesson.x0,
                lesson.conditions,
                lesson.selected_S[index].expand(batch).contiguous(),
                reach.rank * MAX_SLOTS + index * batch,
            )
            for index in range(lesson.selected_S.numel())
        ]
        return torch.stack(errors).double()

    def _sweep(self, lesson: Lesson, evaluate: Evaluate, reach: Reach) -> Tensor:
        """Bits of one sample at the swept steps of this rank's share, 0 at the others; float64 [R]."""
        bits_R = torch.zeros(self.swept_R.numel(), dtype=torch.float64, device=self.swept_R.device)
        if lesson.sample is None:
            return bits_R
        image, conditions = lesson.sample
        batch, num_swept = lesson.x0.shape[0], self.swept_R.numel()
        # Every rank runs the network equally often on full batches: its share is filled up.
        share = -(-num_swept // (reach.num_ranks * batch)) * batch
        place_N = torch.arange(share, device=bits_R.device) * reach.num_ranks + reach.rank
        row_N = self.swept_R[place_N.clamp(max=num_swept - 1)]
        images = image.expand(batch, *image.shape[1:])
        conditions = {
            name: value.expand(batch, *value.shape[1:]) for name, value in conditions.items()
        }
        errors = [
            evaluate(images, conditions, rows, index * batch + reach.rank * share)
            for index, rows in enumerate(row_N.split(batch))
        ]
        mine_N = place_N < num_swept
        bits_N = torch.cat(errors).double() * self.bits_T[row_N] * mine_N
        return bits_R.index_add_(0, place_N.clamp(max=num_swept - 1), bits_N)

    def _gradient(self, lesson: Lesson, reward_B: Tensor) -> tuple[Tensor, Tensor]:
        """REINFORCE: (gradient of the policy's loss, its mean density over the batch)."""
        mean, square, count = self.reward_3
        mean = torch.where(count > 0, mean, reward_B.mean())
        square = torch.where(count > 0, square, reward_B.square().mean())
        scale = (square - mean.square()).clamp_min(0).sqrt() + torch.finfo(torch.float32).tiny
        advantage_B = ((reward_B - mean) / scale).clamp(-10, 10).float()
        with torch.enable_grad():
            log_BT = self.network(lesson.x0.float())
            chosen_B = log_BT.gather(1, lesson.row_B[:, None]).squeeze(1)
            entropy_B = -(log_BT.exp() * log_BT).sum(dim=1)
            loss = -(advantage_B * chosen_B + self.config.entropy * entropy_B).mean()
            pieces = torch.autograd.grad(loss, self.parameters)
        density_T = log_BT.detach().double().exp().mean(dim=0)
        return torch.cat([piece.flatten() for piece in pieces]), density_T

    def _learn(self, gradient: Tensor, moments_2: Tensor) -> None:
        norm = gradient.norm()
        self.adam.step(gradient * (self.config.clip / norm.clamp_min(self.config.clip)))
        decay = torch.where(self.reward_3[2] > 0, self.config.baseline_decay, 0.0)
        self.reward_3[:2] = decay * self.reward_3[:2] + (1 - decay) * moments_2
        self.reward_3[2] += 1

    def tensors(self) -> dict[str, Tensor]:
        state = {f"adam.{name}": tensor for name, tensor in self.adam.tensors().items()}
        state |= {f"selection.{name}": value for name, value in self.selection.tensors().items()}
        return state | {"reward": self.reward_3, "density": self.mean_density_T}
