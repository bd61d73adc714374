"""Do all providers of a training step train the same network? Asked before anything is timed.

Every provider makes STEPS steps from the same weights, at the same time steps and noise. The losses must agree with the
reference's, the first of which must agree with the loss in float64; so must the way that some weights, and their EMAs,
went from where the provider began. bfloat16 leaves the sign of small gradients open, and AdamW's first steps are little
but signs: hence a cosine.

An engine may begin at weights rounded to bfloat16, as DeepSpeed does. Its masters then lie on bfloat16's grid, AdamW's
first step moves all of them by the same length, about one unit of the grid, and what the network sees of that step is
rounded up or away, alike for all weights of a size: no noise, but another step. Such a provider is held against eager
from the same rounded weights, and that against the reference in all but the later losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness.measure import GateError
from benchmarks.ops.diffusion_step.formulas import truth
from benchmarks.train_step import plain_dit
from benchmarks.train_step.problem import Problem, seeded, shapes_of
from benchmarks.train_step.providers import Trainer

STEPS = 3
# Relative: float32 or TF32 of the definition, bfloat16 of the reference.
LOSS_TOLERANCE = {"reference": 1e-3, "low": 1e-2}
START_TOLERANCE = 2.0**-8  # relative: bfloat16's rounding
COSINE = 0.95
LENGTH_TOLERANCE = 0.05  # of how far the weights went


@dataclass(frozen=True)
class Outcome:
    """What a provider's steps gave: losses, and the displacement of some weights and EMAs.

    rounded: it did not begin at the seeded weights themselves, but at weights rounded to bfloat16.
    """

    losses: list[float]
    weights: dict[str, Tensor]
    emas: dict[str, Tensor]
    rounded: bool = False


def watched(problem: Problem) -> list[str]:
    """Weights of the first and the last block, of an embedder, of the last layer, and a bias."""
    last = len({name.split(".")[1] for name in shapes_of(problem.case) if "blocks." in name}) - 1
    return [
        "x_embedder.proj.weight",
        "t_embedder.mlp.0.weight",
        "blocks.0.attn.qkv.weight",
        f"blocks.{last}.mlp.fc2.weight",
        f"blocks.{last}.adaLN_modulation.1.bias",
        "final_layer.linear.weight",
    ]


def run(problem: Problem, trainer: Trainer) -> Outcome:
    """The steps of one provider. Raises GateError where it does not begin at the seeded weights."""
    trainer.reset()
    names, shapes = watched(problem), shapes_of(problem.case)
    starts, rounded = trainer.learned(names, False), False
    for name, start in starts.items():
        seed = seeded(name, shapes[name], problem.device).cpu()
        if not bool(((start - seed).abs() <= START_TOLERANCE * seed.abs()).all()):
            raise GateError(f"{name} does not begin at the seeded weights")
        rounded = rounded or not torch.equal(start, seed)
    losses = [trainer.gate_step(index) for index in range(STEPS)]
    weights, emas = trainer.learned(names, False), trainer.learned(names, True)
    return Outcome(
        losses,
        {name: weights[name] - starts[name] for name in names},
        {name: emas[name] - starts[name] for name in names},
        rounded,
    )


@torch.no_grad()
def expected_loss(problem: Problem, weights: Mapping[str, Tensor]) -> float:
    """The first step's loss by the definition in float64, of the plain network's float32 output at `weights`."""
    model = plain_dit.build(weights=dict(weights), upload=True, **problem.case.network)
    draw = problem.gate_draw(0)
    a_B, b_B = (
        torch.from_numpy(table).to(problem.device)[draw.t_B].view(-1, 1, 1, 1)
        for table in (problem.tables.sqrt_alpha_bar, problem.tables.sqrt_one_minus_alpha_bar)
    )
    x_t = (a_B * problem.x0 + b_B * draw.eps).float()
    out = model(x_t, draw.t_B, problem.labels_B)
    with torch.enable_grad():
        losses_B, _ = truth(problem.tables, problem.x0, out, draw.t_B, draw.eps)
    return float(losses_B.mean())


def judge_reference(outcome: Outcome, expected: float) -> None:
    """Raises GateError unless the first loss is the definition's."""
    _near("the first loss", outcome.losses[0], expected, LOSS_TOLERANCE["reference"])


def judge(outcome: Outcome, reference: Outcome, num_losses: int = STEPS) -> None:
    """Raises GateError with the first thing that is not the reference's; of the losses the first `num_losses`."""
    pairs = zip(outcome.losses[:num_losses], reference.losses[:num_losses], strict=True)
    for index, (loss, expected) in enumerate(pairs):
        _near(f"the loss of step {index}", loss, expected, LOSS_TOLERANCE["low"])
    for what, found, wanted in (
        ("weight", outcome.weights, reference.weights),
        ("EMA of", outcome.emas, reference.emas),
    ):
        for name, move in found.items():
            other = wanted[name]
            length, expected = float(move.norm()), float(other.norm())
            _near(f"the way of {what} {name}", length, expected, LENGTH_TOLERANCE)
            cosine = float((move * other).sum()) / (length * expected)
            if not cosine >= COSINE:
                raise GateError(f"{what} {name} goes another way: cosine {cosine:.3f}")


def _near(what: str, found: float, expected: float, tolerance: float) -> None:
    if not (math.isfinite(found) and abs(found - expected) <= tolerance * abs(expected)):
        raise GateError(f"{what} is {found:.6g}, expected {expected:.6g} within {tolerance:g}")


def agree(
    outcomes: Mapping[str, Outcome], names: Sequence[str], twin: Callable[[], Outcome]
) -> dict[str, str]:
    """Name -> what is wrong, of those of `names` that do not agree with the outcome of `reference`.

    twin: makes the steps of eager from weights rounded to bfloat16; asked for only where a provider begins there.
    """
    red: dict[str, str] = {}
    rounded: Outcome | None = None
    for name in names:
        try:
            expected = outcomes["reference"]
            if outcomes[name].rounded:
                rounded = twin() if rounded is None else rounded
                judge(rounded, expected, num_losses=1)
                expected = rounded
            judge(outcomes[name], expected)
        except GateError as error:
            red[name] = str(error)
    return red
