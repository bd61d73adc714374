"""What the network is told beside the time, in training's words; and whose doing a NaN is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from speed_engine.conditions import Condition, label, vector
from speed_engine.data import ArrayFacts, ConditionFacts
from speed_engine.objectives import epsilon
from speed_engine.sampling.process import Process, Recipe, sample
from speed_engine.schedules import linear

SHAPES = [(2,), (1, 5), (3, 4, 4), (2, 3, 4, 4)]


class Prompt:
    """A condition of two keywords, neither of which is its name."""

    def __init__(self, null: bool) -> None:
        self.facts = ConditionFacts("lab.prompt", {}, null=null)

    def drop(self, arrays, seed, step, first_slot):
        raise AssertionError("sampling drops nothing")

    def null(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        return {"words": torch.zeros(batch, 4), "mask": torch.zeros(batch, 2)}

    def asked(self, requests):
        return {"words": torch.ones(len(requests), 4), "mask": torch.ones(len(requests), 2)}

    def default(self, numbers):
        return self.null(len(numbers), "cpu")


def conditions(null: bool = True) -> dict[str, Condition]:
    dropout = 0.1 if null else 0.0
    place = ConditionFacts("vector", {"place": ArrayFacts((3,), "float32")})
    return {
        "label": label.build(label.Config(dropout=dropout), "label", label.described(4)),
        "place": vector.build(vector.Config(), "place", place),  # has no "none"
        "prompt": Prompt(null),
    }


def process(told: dict[str, Condition], shape: tuple[int, ...] = (1, 2, 2)) -> Process:
    return Process.of(linear.build(linear.Config()), epsilon.Config(), False, shape, told)


class Network:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []

    def __call__(self, x: Tensor, time_B: Tensor, **told: Tensor) -> Tensor:
        assert time_B.shape == x.shape[:1] and all(len(each) == len(x) for each in told.values())
        self.calls.append(told)
        return 0.1 * x


LABEL = {"label": torch.tensor([2, 0])}
PLACE = {"place": torch.tensor([[1.0, 2, 3], [4, 5, 6]])}


def test_guidance_leads_away_from_the_none_of_every_condition_that_has_one() -> None:
    network, one = Network(), process(conditions())
    prompt = one.conditions["prompt"].asked(["a", "b"])
    recipe = Recipe("ddim", 2, guidance=2.0)
    sample(network, one, recipe, conditions_N=LABEL | PLACE | prompt)
    told = network.calls[0]
    assert told["label"].tolist() == [2, 0, 4, 4]
    assert told["words"][:, 0].tolist() == [1, 1, 0, 0] == told["mask"][:, 0].tolist()
    assert torch.equal(told["place"], torch.cat([PLACE["place"], PLACE["place"]]))


def test_a_condition_that_is_left_out_is_none() -> None:
    network, one = Network(), process(conditions())
    sample(network, one, Recipe("ddim", 1), conditions_N=PLACE)
    assert network.calls[0]["label"].tolist() == [4, 4]
    assert network.calls[0]["words"].abs().sum() == 0
    assert set(network.calls[0]) == {"label", "place", "words", "mask"}
    only = {"label": conditions()["label"]}
    sample(network, process(only), Recipe("ddim", 1), numbers=[5, 6, 7])
    assert network.calls[1]["label"].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("null", "given", "words"),
    [
        (True, {}, "no null place; say which place it is told"),
        (True, LABEL, "no null place"),
        (True, LABEL | PLACE | {"text": torch.zeros(2)}, "not told text; it is told label, words"),
        (False, {}, "no null label"),
    ],
)
def test_what_is_missing_or_unknown_is_named(null: bool, given, words: str) -> None:
    network = Network()
    with pytest.raises(ValueError, match=words) as caught:
        sample(
            network,
            process(conditions(null)),
            Recipe("ddim", 1),
            conditions_N=given,
            numbers=[0, 1],
        )
    assert "\n" not in str(caught.value) and not network.calls


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp", "heun"])
def test_samples_of_any_shape(sampler: str, shape: tuple[int, ...]) -> None:
    recipe = Recipe(sampler, 3, guidance=1.5, guidance_channels=1)
    one = process({"label": conditions()["label"]}, shape)
    x = sample(Network(), one, recipe, conditions_N=LABEL)
    assert x.shape == (2, *shape) and x.isfinite().all()
    assert torch.equal(sample(Network(), one, recipe, conditions_N=LABEL, batch_size=1), x)


# ------------------------------------------------------------------------------------------ whose NaN it is


def test_a_network_that_says_nan_is_named_with_the_sample_and_the_time() -> None:
    def network(x: Tensor, time_B: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[1] = torch.where(time_B[1] < 500, float("inf"), 0.0)
        return out

    with pytest.raises(ValueError, match=r"^sample 7 is NaN .* at time 499: .*weights") as caught:
        sample(network, process({}), Recipe("ddim", 4), numbers=[3, 7, 8])
    assert "float32 is too narrow" in str(caught.value) and "\n" not in str(caught.value)


def test_a_sampler_that_makes_nan_does_not_blame_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "wild_pack"
    folder.mkdir()
    (folder / "wild.py").write_text(
        "from typing import Literal\nfrom speed_engine.kinds import Section\n"
        "SPACING, LARGEST_MAGNIFICATION = 'trailing', 1e300\n"
        "class Config(Section):\n    kind: Literal['wild'] = 'wild'\n"
        "class Wild:\n    def step(self, level, x, predict, noise):\n"
        "        return predict(level, x)[0] * (float('inf') if level == 1 else 1)\n"
        "def build(alpha_bar, clip_x0):\n    return Wild()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = Recipe("wild_pack.wild", 3)
    with pytest.raises(ValueError, match=r"sampler wild_pack\.wild made it so") as caught:
        sample(lambda x, time_B: x, process({}), recipe, numbers=[0])
    assert "weights" not in str(caught.value) and "--steps" in str(caught.value)
