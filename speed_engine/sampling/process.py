"""A trained network's process, a recipe, and `sample`: the chain from noise to samples.

The noise of sample i is addressed, not streamed: it depends on (seed, sample number i, sampler
step) alone, so a sample is the same in any batch, on any device and after any interruption.
Few-step sampling works on a *respaced* process (Nichol and Dhariwal, arXiv 2102.09672, section 4):
the S kept levels form a diffusion of their own, on which every step is "t -> t - 1". Any schedule
x_t = alpha x0 + sigma eps is sampled as a variance-preserving one, x_t / sqrt(alpha^2 + sigma^2), and
any objective through the x0 it predicts. Pictures on disk are the business of folder.py.

Shapes: N samples, B batch, C channels, T rows of the schedule, S sampler steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel
from speed_kernels import philox
from torch import Tensor

from speed_engine import kinds
from speed_engine.conditions import Condition
from speed_engine.objectives import Objective
from speed_engine.sampling import grid
from speed_engine.sampling.guidance import Model, evaluate, nulls
from speed_engine.schedules import Schedule

Spacing = Literal["auto", "linspace", "leading", "trailing", "karras"]


@dataclass(frozen=True, eq=False)
class Process:
    """What the network was trained on, and for.

    schedule: as it was configured, its rows not moved to where training draws. conditions: what the
    network is told beside the time, by name.
    """

    schedule: Schedule
    objective: Objective
    learned_variance: bool
    shape: tuple[int, ...]  # C, *space
    conditions: Mapping[str, Condition] = field(default_factory=dict)

    @staticmethod
    def of(
        schedule: Schedule,
        objective: BaseModel,
        learned_variance: bool,
        shape: tuple[int, ...],
        conditions: Mapping[str, Condition],
    ) -> Process:
        """From a step table's schedule, moved or not, and the objective's settings."""
        plain = schedule.unmoved
        built = kinds.home(objective).build(objective, plain)
        return Process(plain, built, learned_variance, shape, conditions)

    @property
    def norm(self) -> np.ndarray:
        """sqrt(alpha^2 + sigma^2), the scale of x_t against the variance-preserving one; [T]."""
        return np.hypot(self.schedule.alpha.numpy(), self.schedule.sigma.numpy())

    @property
    def alpha_bar(self) -> np.ndarray:
        """alpha_bar of the variance-preserving process that x_t / norm follows; float64 [T]."""
        return (self.schedule.alpha.numpy() / self.norm) ** 2


@dataclass(frozen=True)
class Recipe:
    """What the user chooses; together with the weights it decides every pixel.

    sampler: a file of this folder (dpm++ is dpmpp), or the dotted path of one outside. guidance: 1 =
    off; w > 1 gives null + w * (told - null). guidance_channels: "all", or the number of leading
    channels that are guided (3 reproduces the released DiT and GLIDE samplers, which leave the fourth
    latent channel unguided). spacing: which S of the T levels (see `grid`); auto = linspace for ddpm
    (as in ADM and DiT, holds the first and the last step), Karras' levels for the others on EDM and VE,
    trailing elsewhere (starts at pure noise, arXiv 2305.08891, table 2); leading is the original
    DDIM's. clip_x0: clamp each prediction of x0 to [-1, 1]; for pixels, not for latents.
    """

    sampler: str = "ddpm"
    steps: int = 250
    spacing: Spacing = "auto"
    guidance: float = 1.0
    guidance_channels: int | Literal["all"] = "all"
    clip_x0: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.module
        if self.spacing not in grid.SPACINGS:
            raise ValueError(
                f"there is no spacing {self.spacing!r}; choose one of {', '.join(grid.SPACINGS)}"
            )
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a number from 0 up, not {self.guidance}")
        if self.guidance_channels != "all" and self.guidance == 1:
            raise ValueError("guidance_channels has no effect at guidance 1; leave it at 'all'")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")

    @property
    def module(self) -> Any:
        """The sampler's file. Raises ValueError for a word that is none, with those there are."""
        return kinds.find("sampling", "dpmpp" if self.sampler == "dpm++" else self.sampler)


def check(process: Process, recipe: Recipe, conditions_N: Mapping[str, Tensor] | None) -> None:
    """Raise ValueError, in one sentence, where the three contradict each other."""
    learned = [name for name, each in process.conditions.items() if each.facts.null]
    if recipe.guidance != 1 and not process.conditions:
        raise ValueError("guidance needs a conditional model; for this one use guidance 1")
    if recipe.guidance != 1 and not learned:
        name = next(iter(process.conditions))
        raise ValueError(
            f"guidance needs a network that has learned no {name}; train with "
            f"conditions.{name}.dropout above 0, or use guidance 1"
        )
    if recipe.guidance != 1 and conditions_N is None:
        raise ValueError("guidance needs something to guide towards; give conditions or use 1")
    if conditions_N is None and len(learned) < len(process.conditions):
        missing = next(name for name in process.conditions if name not in learned)
        raise ValueError(f"this model has no null {missing}; say which {missing} it is told")
    if conditions_N and not process.conditions:
        raise ValueError(f"this model is unconditional; leave {next(iter(conditions_N))} out")
    for name, condition in process.conditions.items():
        values = None if conditions_N is None else conditions_N.get(name)
        if values is not None and condition.facts.num_values and len(values):
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= condition.facts.num_values:
                wrong, last = low if low < 0 else high, condition.facts.num_values - 1
                raise ValueError(f"{name} {wrong} is not a class; give one from 0 to {last}")
    channels = process.shape[0]
    if recipe.guidance_channels != "all" and not 1 <= recipe.guidance_channels <= channels:
        raise ValueError(
            f"guidance_channels={recipe.guidance_channels} must be 'all' or from 1 to {channels}"
        )
    kept_steps(process, recipe)


def kept_steps(process: Process, recipe: Recipe) -> np.ndarray:
    """The S rows of the schedule that the sampler visits, ascending, int64. Raises ValueError for S > T."""
    module = recipe.module
    magnification = process.objective.x0_columns(process.schedule)[0].abs().numpy()
    spacing = grid.choose_spacing(process.schedule, recipe.spacing, module.SPACING)
    limit = module.LARGEST_MAGNIFICATION
    return grid.rows(process.schedule, magnification, recipe.steps, spacing, limit)


def _sample_batch(
    model: Model,
    process: Process,
    recipe: Recipe,
    numbers: Sequence[int],
    told: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> Tensor:
    """One batch through the whole chain; the state is kept in float32 (float64 if `dtype` is)."""
    kept = kept_steps(process, recipe)
    bar_S, norm_S = process.alpha_bar[kept], process.norm[kept]
    scale_S = norm_S * process.objective.input_scale.numpy()[kept]
    of_out_S, of_x_S = (c.numpy()[kept] for c in process.objective.x0_columns(process.schedule))
    time_S = process.schedule.time.numpy()[kept]
    state = torch.promote_types(dtype, torch.float32)
    slots_B = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    channels, outputs = process.shape[0], process.shape[0] * (1 + process.learned_variance)
    null = nulls(process.conditions, len(slots_B), device)

    def noise(step: int) -> Tensor:
        num = math.prod(process.shape)
        flat = philox.normals(recipe.seed, step, slots_B, philox.STREAM_SAMPLE, num, torch.float32)
        return flat.reshape(-1, *process.shape).to(state)

    def predict(level: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs, time = (x * float(scale_S[level])).to(dtype), float(time_S[level])
        guide = (recipe.guidance, recipe.guidance_channels, channels)
        out = evaluate(model, inputs, time, told, null, *guide)
        if out.shape[1] != outputs:
            raise ValueError(
                f"the model returns {out.shape[1]} channels for {channels} with learned_variance="
                f"{process.learned_variance}; sample with the settings it was trained with"
            )
        fraction = (out[:, channels:] + 1) / 2 if process.learned_variance else None
        of_out, of_x = float(of_out_S[level]), float(of_x_S[level] * norm_S[level])
        return of_out * out[:, :channels].to(state) + of_x * x, fraction

    sampler = recipe.module.build(bar_S, recipe.clip_x0)
    x = noise(0)
    for step, level in enumerate(reversed(range(len(kept))), start=1):
        x = sampler.step(level, x, predict, functools.partial(noise, step))
        progress(len(x))
    return x


@torch.no_grad()
def sample(
    model: Model,
    process: Process,
    recipe: Recipe,
    *,
    conditions_N: Mapping[str, Tensor] | None = None,
    numbers: Sequence[int] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw samples: x [N, C, *space] in model space, float32 (float64 if `dtype` is), on `device`.

    conditions_N: the network's keywords [N, ...], or None for an unconditional model or "none" of
    every condition. numbers: the global number of each sample, which addresses its noise; default 0
    .. N-1; needed if conditions_N holds nothing. dtype: what `x` is cast to for the network, i.e. the
    dtype of its weights. progress: called with the batch's size after each sampler step. The samples
    do not depend on batch_size, beyond the rounding of the network's own matrix products. Raises
    ValueError where model, recipe and conditions contradict each other.
    """
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode; call model.eval() before sampling")
    if numbers is None:
        if not conditions_N:
            raise ValueError("give conditions_N or numbers, to say how many samples to draw")
        numbers = range(len(next(iter(conditions_N.values()))))
    for name, values in (conditions_N or {}).items():
        if len(values) != len(numbers):
            raise ValueError(
                f"{len(values)} of {name} for {len(numbers)} samples; give one for each"
            )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    check(process, recipe, conditions_N)
    device = torch.device(device)
    parts = []
    for start in range(0, len(numbers), batch_size):
        batch = slice(start, start + batch_size)
        part = numbers[batch]
        if conditions_N is None:
            told = nulls(process.conditions, len(part), device)
        else:
            told = {name: values[batch].to(device) for name, values in conditions_N.items()}
        tell = progress or (lambda _: None)
        parts.append(_sample_batch(model, process, recipe, part, told, device, dtype, tell))
    return torch.cat(parts) if parts else torch.empty(0, *process.shape, device=device)
