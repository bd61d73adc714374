"""A process as a scheduler of diffusers, wherever one walks the same levels with the same formula as `--sampler ddim`.

In discrete time that is DDIMScheduler with trailing spacing; on rectified flow FlowMatchEulerDiscreteScheduler, whose
step is DDIM's there. What a network predicts is told from its columns, not from a name, so that objectives from outside
are seen for what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speed_engine.sampling.ddim import LARGEST_MAGNIFICATION
from speed_engine.sampling.process import Process
from speed_engine.schedules import Schedule

TOLERANCE = 1e-6  # of columns, which are float64; diffusers keeps its own in float32


@dataclass(frozen=True)
class Scheduler:
    """kind: the class of diffusers. config: what is in its scheduler_config.json."""

    kind: str
    config: dict[str, Any]

    @property
    def flow(self) -> bool:
        """Whether it is rectified flow's."""
        return self.kind.startswith("Flow")


def scheduler_of(process: Process, clip_x0: bool) -> Scheduler | str:
    """The scheduler that draws as `sample --sampler ddim` does, or in one sentence why diffusers has none.

    clip_x0: each prediction of x0 is clamped to [-1, 1], as `sample` does for pixels.
    """
    plain = process.schedule.unmoved
    objective = process.objective_on(plain)
    if (objective.input_scale - 1).abs().max() > TOLERANCE:
        return f"its schedulers do not scale the network's input as objective {objective.kind} does"
    of_out, of_x = objective.x0_columns(plain)
    if plain.continuous:
        return _flow(plain, of_out, of_x, clip_x0)
    return _ddim(plain, of_out, of_x, objective.kind, clip_x0)


def _ddim(
    plain: Schedule, of_out: Tensor, of_x: Tensor, objective: str, clip_x0: bool
) -> Scheduler | str:
    alpha, sigma, num = plain.alpha, plain.sigma, plain.num_rows
    numbered = torch.arange(num, dtype=torch.float64)
    if plain.betas is None or (alpha.square() + sigma.square() - 1).abs().max() > TOLERANCE:
        return f"DDIMScheduler keeps the variance of x_t, and schedule {plain.kind} does not"
    if (plain.time - numbered).abs().max() > TOLERANCE:
        return "DDIMScheduler tells the network the number of the step, and this one is told another time"
    one = torch.ones_like(alpha)
    meanings = {
        "epsilon": (-sigma / alpha, 1 / alpha),
        "sample": (one, 0 * one),
        "v_prediction": (-sigma, alpha),
    }
    said = [name for name, columns in meanings.items() if _same((of_out, of_x), columns)]
    if not said:
        return f"DDIMScheduler knows no network that predicts what objective {objective} says"
    beyond = int((~(of_out.abs() <= LARGEST_MAGNIFICATION)).sum())
    if beyond:
        return (
            f"DDIMScheduler starts at the last step, and the last {beyond} of schedule {plain.kind} are so noisy that "
            f"a network of objective {objective} tells nothing of the picture there (`sample` leaves them out)"
        )
    config = {
        "num_train_timesteps": num,
        **_betas(plain.betas),
        "prediction_type": said[0],
        "timestep_spacing": "trailing",
        "clip_sample": clip_x0,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,  # the betas are those after it
        "thresholding": False,
    }
    return Scheduler("DDIMScheduler", config)


def _same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    """Whether columns agree, infinities (epsilon at zero SNR) included."""
    return all(
        torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        for a, b in zip(found, wanted, strict=True)
    )


def _betas(betas: Tensor) -> dict[str, Any]:
    """By name where the name gives the same numbers, so that other schedulers and people read it; else each of them."""
    first, last, num = float(betas[0]), float(betas[-1]), len(betas)
    ends = {"beta_start": first, "beta_end": last, "trained_betas": None}
    straight = torch.linspace(first, last, num, dtype=torch.float64)
    roots = torch.linspace(first**0.5, last**0.5, num, dtype=torch.float64).square()
    for name, named in (("linear", straight), ("scaled_linear", roots)):
        if torch.allclose(betas, named, rtol=TOLERANCE, atol=0):
            return {"beta_schedule": name, **ends}
    return {"beta_schedule": "linear", **ends, "trained_betas": betas.tolist()}


def _flow(plain: Schedule, of_out: Tensor, of_x: Tensor, clip_x0: bool) -> Scheduler | str:
    alpha, sigma = plain.alpha, plain.sigma
    velocity = _same((of_out, of_x), (-sigma, torch.ones_like(sigma)))
    scale = float(plain.time[-1] / sigma[-1])
    told = (plain.time - scale * sigma).abs().max() <= TOLERANCE * scale
    if (alpha + sigma - 1).abs().max() > TOLERANCE or not velocity or not told:
        return f"it has no scheduler for this network on the continuous schedule {plain.kind}"
    if abs(scale - round(scale)) > TOLERANCE:
        return f"FlowMatchEulerDiscreteScheduler counts whole steps, and schedule.time_scale is {scale:g}"
    if clip_x0:
        return (
            "FlowMatchEulerDiscreteScheduler cannot clamp the predicted pixels to [-1, 1], as `sample` does, "
            "and drifts away from it"
        )
    assert plain.curve is not None
    middle = float(plain.curve(torch.tensor([0.5], dtype=torch.float64))[1])
    config = {"num_train_timesteps": round(scale), "shift": middle / (1 - middle)}
    return Scheduler("FlowMatchEulerDiscreteScheduler", config | {"use_dynamic_shifting": False})
