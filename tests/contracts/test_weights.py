"""Every network of the models folder, with and without conditions, through a weights file and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speed_engine import kinds
from speed_engine.conditions import image, label
from speed_engine.data import ArrayFacts, ConditionFacts, Facts
from speed_engine.data.space import Space
from speed_engine.weights import file as weights_file

# The least that a kind can be; a kind that is not here is taken with its defaults.
DIT: dict[str, Any] = {"size": "tiny/2", "hidden_size": 8, "depth": 1, "num_heads": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "dit": DIT,
    "dit_text": DIT,
    "mdt": {**DIT, "depth": 2, "decoder_depth": 1},
    "unet": {"size": "tiny", "width": 8, "num_blocks": 1},
}


def condition(name: str, null: bool) -> ConditionFacts:
    """What a set could hold for a condition: classes, or else three numbers a sample."""
    if name == "label":
        return label.described(5, [str(number) for number in range(5)], null=null)
    if name == "image":
        small = image.described((2, 4, 4), Space.pixels(2), mirrored=True)
        return replace(small, null=null, details={**small.details, "noise": 0.5})
    return ConditionFacts(name, {name: ArrayFacts((3,), "float32")}, null=null)


def cases() -> Iterator[Any]:
    """(kind, conditions, null): each kind with no condition, with each one, and with all."""
    for kind in kinds.names("model"):
        takes = kinds.find("model", kind).TAKES
        for told in dict.fromkeys([(), *((name,) for name in takes), takes]):
            for null in (False, True) if told else (False,):
                name = f"{kind}-{'+'.join(told) or 'nothing'}{'-null' if null else ''}"
                yield pytest.param(kind, told, null, id=name)


def random_network(kind: str, told: tuple[str, ...], null: bool) -> Any:
    config = kinds.config_of("model", {"kind": kind, **SETTINGS.get(kind, {})})
    space = Space("latents", (0.5, 0.25), (0.0, 1.5), posterior=True, vae="somebody/vae")
    facts = Facts((2, 8, 8), space, {name: condition(name, null) for name in told}, flips=True)
    model = kinds.home(config).build(config, facts, 4, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_there_are_kinds() -> None:
    assert "dit" in {case.values[0] for case in cases()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "told", "null"), cases())
def test_there_and_back(
    kind: str, told: tuple[str, ...], null: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_network(kind, told, null)
    weights = {key: value.to(dtype) for key, value in model.state_dict().items()}
    weights_file.save(tmp_path / "m.safetensors", model, weights, {"step": 2})
    again, notes = weights_file.load(tmp_path / "m.safetensors")
    assert type(again) is type(model) and notes == {"step": 2}
    assert (again.facts, again.num_outputs) == (model.facts, model.num_outputs)
    assert again.config == model.config
    found = again.state_dict()
    assert list(found) == list(weights)
    for key, value in weights.items():
        assert torch.equal(found[key], value.to(found[key].dtype)), key
    stored, _ = weights_file.read_safetensors(tmp_path / "m.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}


@pytest.mark.parametrize("kind", kinds.names("model"))
def test_how_to_compute_is_not_in_the_file(kind: str, tmp_path: Path) -> None:
    model = random_network(kind, (), False)
    weights_file.save(tmp_path / "m.safetensors", model)
    header = json.loads(
        weights_file.read_safetensors(tmp_path / "m.safetensors")[1]["speed_engine"]
    )
    compute = set(getattr(kinds.find("model", kind), "COMPUTE_KEYS", ()))
    assert compute <= set(type(model.config).model_fields)
    learned = set(type(model.config).model_fields) - compute
    assert set(header["model"]["config"]) | {"kind"} == learned


@pytest.mark.parametrize(("kind", "told", "null"), cases())
def test_weights_of_other_facts_do_not_fit(
    kind: str, told: tuple[str, ...], null: bool, tmp_path: Path
) -> None:
    """A header that says what the tensors are not is refused, whatever the kind."""
    model = random_network(kind, told, null)
    liar = random_network(kind, told, null)
    liar.facts = replace(model.facts, shape=(3, 8, 8))
    weights_file.save(tmp_path / "m.safetensors", liar)
    with pytest.raises(ValueError, match=r"m\.safetensors does not fit the model"):
        weights_file.load(tmp_path / "m.safetensors")
