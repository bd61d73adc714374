"""A trained network's process, a recipe, and `sample`: the chain from noise to samples.

The noise of sample i is addressed, not streamed: it depends on (seed, sample number i, sampler
step) alone, so a sample is the same in any batch, on any device and after any interruption.
Few-step sampling works on a *respaced* process (Nichol and Dhariwal, arXiv 2102.09672, section 4):
the S levels form a diffusion of their own, on which every step is "t -> t - 1". Any schedule
x_t = alpha x0 + sigma eps is sampled as a variance-preserving one, x_t / sqrt(alpha^2 + sigma^2), and
any objective through the x0 it predicts. Pictures on disk are the business of folder.py.

Shapes: N samples, B batch, C channels, T rows of the schedule, S sampler steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel
from speed_kernels import philox
from torch import Tensor

from speed_engine import kinds
from speed_engine.conditions import Augmenting, Condition
from speed_engine.sampling import Sampler, grid
from speed_engine.sampling.guidance import Model, completed, evaluate, nulls, scale_at
from speed_engine.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Process:
    """What the network was trained on, and for.

    schedule: a step table's; whether training moved its rows makes no difference. objective_on:
    builds the objective on a schedule. conditions: what the network is told beside the time, by name.
    """

    schedule: Schedule
    objective_on: grid.ObjectiveOn
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
        """From a step table's schedule and the objective's settings."""
        objective_on = functools.partial(kinds.home(objective).build, objective)
        return Process(schedule, objective_on, learned_variance, shape, conditions)

    def levels(self, recipe: Recipe) -> grid.Levels:
        """The S noise levels that `recipe` visits. Raises ValueError where there are none such."""
        module = recipe.module
        spacing = grid.choose_spacing(self.schedule.unmoved, recipe.spacing, module.SPACING)
        how = (recipe.steps, spacing, module.LARGEST_MAGNIFICATION, recipe.shift)
        return grid.levels(self.schedule, self.objective_on, *how)


@dataclass(frozen=True)
class Recipe:
    """What the user chooses; together with the weights it decides every pixel.

    sampler: a file of this folder (dpm++ is dpmpp), or the dotted path of one outside. guidance: 1 =
    off; w > 1 gives null + w * (told - null). guidance_power: above 0 guidance grows from 1 at pure noise to
    w at the data (`guidance.scale_at`; MDT's is 4). guidance_channels: "all", or the number of leading
    channels that are guided (3 reproduces the released DiT and GLIDE samplers, which leave the fourth
    latent channel unguided). spacing: which S levels (see `grid`); auto = linspace for ddpm (as in ADM and
    DiT, holds the first and the last step), Karras' levels for the others on EDM and VE, trailing
    elsewhere (starts at pure noise, arXiv 2305.08891, table 2); leading is the original DDIM's. shift:
    of rectified flow, above 1 takes more levels at high noise (Esser et al. 2024). clip_x0: clamp each
    prediction of x0 to [-1, 1]; for pixels, not for latents, and not as EDM's own sampler has it.
    """

    sampler: str = "ddpm"
    steps: int = 250
    spacing: grid.Spacing = "auto"
    shift: float = 1.0
    guidance: float = 1.0
    guidance_power: float = 0.0
    guidance_channels: int | Literal["all"] = "all"
    clip_x0: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.module
        spacings = get_args(grid.Spacing)
        if self.spacing not in spacings:
            raise ValueError(
                f"there is no spacing {self.spacing!r}; choose one of {', '.join(spacings)}"
            )
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift must be a number above 0, not {self.shift}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a number from 0 up, not {self.guidance}")
        if self.guidance_channels != "all" and self.guidance == 1:
            raise ValueError("guidance_channels has no effect at guidance 1; leave it at 'all'")
        if not (math.isfinite(self.guidance_power) and self.guidance_power >= 0):
            raise ValueError(
                f"guidance_power must be a number from 0 up, not {self.guidance_power}"
            )
        if self.guidance_power and self.guidance == 1:
            raise ValueError("guidance_power has no effect at guidance 1; leave it at 0")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")

    @property
    def module(self) -> Any:
        """The sampler's file, a `SamplerFile`. Raises ValueError for a word that is none, with those there are."""
        found = kinds.find("sampling", "dpmpp" if self.sampler == "dpm++" else self.sampler)
        for name in ("SPACING", "LARGEST_MAGNIFICATION"):
            if not hasattr(found, name):
                raise ValueError(
                    f"the sampler {self.sampler} has no {name}; add it, as speed_engine/sampling/ddim.py has it"
                )
        return found


def check(process: Process, recipe: Recipe, conditions_N: Mapping[str, Tensor] | None) -> None:
    """Raise ValueError, in one sentence, where the three contradict each other."""
    guiding = {
        name: each for name, each in process.conditions.items() if not isinstance(each, Augmenting)
    }
    learned = [name for name, each in guiding.items() if each.facts.null]
    if recipe.guidance != 1 and not guiding:
        raise ValueError("guidance needs a conditional model; for this one use guidance 1")
    if recipe.guidance != 1 and not learned:
        name = next(iter(guiding))
        raise ValueError(
            f"guidance needs a network that has learned no {name}; train with "
            f"conditions.{name}.dropout above 0, or use guidance 1"
        )
    if recipe.guidance != 1 and not conditions_N:
        raise ValueError("guidance needs something to guide towards; give conditions or use 1")
    completed(process.conditions, conditions_N or {}, 1, torch.device("cpu"))
    for name, condition in process.conditions.items():
        values = (conditions_N or {}).get(name)
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
    process.levels(recipe)


class _Network:
    """The network with its guidance on one batch: x0 at a level, as a sampler asks for it."""

    def __init__(
        self,
        model: Model,
        process: Process,
        recipe: Recipe,
        told: Mapping[str, Tensor],
        dtype: torch.dtype,
        slots_B: Tensor,
    ) -> None:
        self.model, self.process, self.recipe = model, process, recipe
        self.told, self.dtype = told, dtype
        self.null = nulls(process.conditions, len(slots_B), slots_B.device)
        self.levels = process.levels(recipe)
        # The level at which a finite input gave an output that is not; -1 while there is none.
        self.broken_B = torch.full_like(slots_B, -1)

    def __call__(self, level: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        levels, channels = self.levels, self.process.shape[0]
        inputs = (x * float(levels.input_scale[level])).to(self.dtype)
        recipe, time = self.recipe, float(levels.time[level])
        scale = scale_at(float(levels.place[level]), recipe.guidance, recipe.guidance_power)
        guide = (scale, recipe.guidance_channels, channels)
        out = evaluate(self.model, inputs, time, self.told, self.null, *guide)
        learned = self.process.learned_variance
        if out.shape[1] != channels * (1 + learned):
            raise ValueError(
                f"the model returns {out.shape[1]} channels for {channels} with learned_variance="
                f"{learned}; sample with the settings it was trained with"
            )
        broke_B = (self.broken_B < 0) & _finite(inputs) & ~_finite(out)
        self.broken_B = self.broken_B.masked_fill(broke_B, level)
        fraction = (out[:, channels:] + 1) / 2 if learned else None
        of_out, of_x = float(levels.of_out[level]), float(levels.of_x[level])
        return of_out * out[:, :channels].to(x.dtype) + of_x * x, fraction

    def refuse_nan(self, x: Tensor, numbers: Sequence[int]) -> None:
        """Raise ValueError where a sample is not finite, and say whose doing that is."""
        lost_B = ~_finite(x)
        if not lost_B.any():
            return
        place = int(lost_B.nonzero()[0])
        level, who = int(self.broken_B[place]), f"sample {numbers[place]} is NaN or infinite"
        if level < 0:
            raise ValueError(
                f"{who}, and the network's outputs are finite: sampler {self.recipe.sampler} made it so; give other "
                "--steps or another --sampler"
            )
        raise ValueError(
            f"{who} since the network's output is, at time {self.levels.time[level]:g}: the weights are damaged or "
            f"{str(self.dtype).removeprefix('torch.')} is too narrow; take an older checkpoint"
        )


def _finite(x: Tensor) -> Tensor:
    """Whether all of a sample is finite; bool [B]. No wait for the device."""
    return x.isfinite().flatten(1).all(1)


def _sample_batch(
    network: _Network,
    sampler: Sampler,
    numbers: Sequence[int],
    slots_B: Tensor,
    progress: Callable[[int], None],
) -> Tensor:
    """One batch through the whole chain; the state is kept in float32 (float64 if the network's dtype is)."""
    state, shape = torch.promote_types(network.dtype, torch.float32), network.process.shape
    seed, steps = network.recipe.seed, network.recipe.steps

    def noise(step: int) -> Tensor:
        num = math.prod(shape)
        flat = philox.normals(seed, step, slots_B, philox.STREAM_SAMPLE, num, torch.float32)
        return flat.reshape(-1, *shape).to(state)

    x = noise(0)
    for step, level in enumerate(reversed(range(steps)), start=1):
        x = sampler.step(level, x, network, functools.partial(noise, step))
        progress(len(x))
    network.refuse_nan(x, numbers)
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

    conditions_N: the network's keywords [N, ...]; a condition that is left out is "none". numbers:
    the global number of each sample, which addresses its noise; default 0 .. N-1; needed if
    conditions_N holds nothing. dtype: what `x` is cast to for the network, i.e. the dtype of its
    weights. progress: called with the batch's size after each sampler step. The samples do not depend
    on batch_size, beyond the rounding of the network's own matrix products. Raises ValueError where
    model, recipe and conditions contradict each other, and for a sample that is not finite.
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
        slots_B = torch.tensor(list(part), dtype=torch.int64, device=device)
        given = {name: each[batch].to(device) for name, each in (conditions_N or {}).items()}
        told = completed(process.conditions, given, len(part), device)
        network = _Network(model, process, recipe, told, dtype, slots_B)
        sampler = recipe.module.build(network.levels.alpha_bar, recipe.clip_x0)
        tell = progress or (lambda _: None)
        parts.append(_sample_batch(network, sampler, part, slots_B, tell))
    return torch.cat(parts) if parts else torch.empty(0, *process.shape, device=device)
