"""Which time steps a sampler visits, what it refuses, and the decoder of latents."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from speed_engine.conditions import Condition
from speed_engine.conditions import label as label_file
from speed_engine.objectives import Objective
from speed_engine.sampling.process import (
    Process,
    Recipe,
    sample,
)
from speed_engine.schedules import Schedule, from_alphas_cumprod

LINEAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
COSINE = np.cumprod(
    1
    - np.minimum(
        0.999,
        1
        - np.cos((np.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        / np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2,
    )
)
SHAPE = (1, 2, 2)


def labelled(num: int, dropout: float = 0.1) -> dict[str, Condition]:
    """A class of `num`, with a null label where it is dropped."""
    config = label_file.Config(dropout=dropout)
    return {"label": label_file.build(config, "label", label_file.described(num))}


def process(objective="epsilon", alpha_bar=LINEAR, **changes) -> Process:
    def on(schedule: Schedule) -> Objective:
        zero, one = torch.zeros_like(schedule.alpha), torch.ones_like(schedule.alpha)
        columns = {
            "epsilon": (zero, one),
            "x0": (one, zero),
            "v": (-schedule.sigma, schedule.alpha),
        }
        return Objective(objective, *columns[objective], one)

    schedule = from_alphas_cumprod(torch.from_numpy(np.asarray(alpha_bar)))
    facts = {"learned_variance": False, "shape": SHAPE, **changes}
    return Process(schedule, on, **facts)


def kept_steps(process: Process, recipe: Recipe) -> np.ndarray:
    """The time steps that are visited; the network is told their numbers."""
    return process.levels(recipe).time.astype(int)


def constant(x: Tensor, tau: Tensor, label: Tensor | None = None) -> Tensor:
    """A network that has learned nothing."""
    return torch.zeros_like(x)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "heun"])
@pytest.mark.parametrize("spacing", ["auto", "linspace", "leading", "trailing"])
def test_kept_steps_are_distinct_for_every_count(sampler: str, spacing: str) -> None:
    facts = process("v")
    for steps in [*range(1, 40), 250, 333, 501, 750, 999, 1000]:
        kept = kept_steps(facts, Recipe(sampler=sampler, steps=steps, spacing=spacing))
        assert len(kept) == steps and kept[0] >= 0 and kept[-1] <= 999
        assert np.all(np.diff(kept) > 0)


def test_spacings() -> None:
    facts = process()
    ddpm = kept_steps(facts, Recipe(steps=250))
    assert ddpm[:4].tolist() == [0, 4, 8, 12] and ddpm[-1] == 999
    ddim = kept_steps(facts, Recipe(sampler="ddim", steps=50))
    assert ddim.tolist() == list(range(19, 1000, 20))
    old = kept_steps(facts, Recipe(sampler="ddim", steps=50, spacing="leading"))
    assert old.tolist() == list(range(0, 1000, 20))
    cosine = process(alpha_bar=COSINE)
    assert kept_steps(cosine, Recipe(sampler="ddim", steps=50))[-1] < 999  # ODE, epsilon
    assert kept_steps(cosine, Recipe(sampler="ddpm", steps=50))[-1] == 999
    assert kept_steps(process("v", COSINE), Recipe(sampler="ddim", steps=50))[-1] == 999


@pytest.mark.parametrize(
    ("facts", "recipe", "labels", "words"),
    [
        ({}, {"guidance": 2.0}, None, "conditional model"),
        ({"conditions": labelled(3, 0.0)}, {"guidance": 2.0}, [0], r"conditions\.label\.dropout"),
        ({"conditions": labelled(3)}, {"guidance": 2.0}, None, "guide towards"),
        ({"conditions": labelled(3, 0.0)}, {}, None, "no null label"),
        ({}, {}, [0], "unconditional"),
        (
            {"conditions": labelled(3, 0.0)},
            {},
            [0, 3],
            "label 3 is not a class; give one from 0 to 2",
        ),
        ({"conditions": labelled(3, 0.0)}, {}, [-1], "label -1"),
        ({}, {"steps": 1001}, None, "more than the 1000 time steps"),
        (
            {"conditions": labelled(3)},
            {"guidance": 2.0, "guidance_channels": 3},
            [0],
            "from 1 to 1",
        ),
    ],
)
def test_contradictions_are_refused_before_any_work(facts, recipe, labels, words: str) -> None:
    def model(*_: object) -> Tensor:
        raise AssertionError("the model must not be called")

    labels = None if labels is None else torch.tensor(labels)
    with pytest.raises(ValueError, match=words) as caught:
        sample(
            model,
            process(**facts),
            Recipe(**recipe),
            conditions_N=None if labels is None else {"label": labels},
            numbers=None if labels is not None else [0],
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"sampler": "heum"}, "no 'heum'; did you mean 'heun'"),
        ({"spacing": "even"}, "no spacing 'even'"),
        ({"steps": 0}, "at least 1"),
        ({"guidance": -1.0}, "from 0 up"),
        ({"guidance": math.nan}, "from 0 up"),
        ({"guidance_channels": 3}, "no effect"),
        ({"guidance_power": 4.0}, "no effect"),
        ({"guidance": 2.0, "guidance_power": -1.0}, "from 0 up"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_recipes(recipe, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe(**recipe)


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("steps", "spacing", "place"), [(1, "trailing", 0.5), (2, "leading", 0)])
def test_guidance_can_grow_towards_the_data(steps, spacing, place, power: float) -> None:
    """The last of the chain's levels decides, of a network that says 1, and 0 when it is told nothing."""

    def network(x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return (label != 3).to(x).view(-1, 1, 1, 1).expand_as(x)

    facts = process("x0", alpha_bar=[0.9, 0.5], conditions=labelled(3))
    how = {"sampler": "ddim", "steps": steps, "spacing": spacing}
    recipe = Recipe(**how, guidance=3.0, guidance_power=power)
    x = sample(network, facts, recipe, conditions_N={"label": torch.zeros(2, dtype=torch.int64)})
    wanted = 1 + 2 * (1 - math.cos(math.pi * (1 - place) ** power)) / 2
    assert 1 < wanted <= 3
    torch.testing.assert_close(x, torch.full_like(x, wanted))


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="returns 1 channels"):
        sample(constant, process(learned_variance=True), Recipe(steps=2), numbers=[0])
    with pytest.raises(ValueError, match="training mode"):
        sample(nn.Identity(), process(), Recipe(steps=2), numbers=[0])
    with pytest.raises(ValueError, match="how many"):
        sample(constant, process(), Recipe(steps=2))
    with pytest.raises(ValueError, match="2 of label for 3 samples"):
        facts = process(conditions=labelled(2, 0.0))
        sample(
            constant,
            facts,
            Recipe(steps=2),
            conditions_N={"label": torch.zeros(2).long()},
            numbers=[0, 1, 2],
        )


def test_import_is_light() -> None:
    code = "import sys, speed_engine.sampling.process; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
