"""Every network and every condition: what `speed_engine.models` and `speed_engine.conditions` promise."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from speed_engine import kinds
from speed_engine.conditions import Augmenting, Condition, Mirroring, Noising, image, label, text
from speed_engine.data import ArrayFacts, ConditionFacts, Facts
from speed_engine.data.space import Space
from speed_engine.models import refuse_unknown_conditions

# The smallest settings of each network.
SMALL: dict[str, dict[str, Any]] = {
    "dit": {"size": "tiny/2", "hidden_size": 16, "depth": 2, "num_heads": 2},
    "dit_text": {
        "size": "tiny/2",
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "cross_attention": True,
    },
    "mdt": {"size": "tiny/2", "hidden_size": 16, "depth": 3, "num_heads": 2},
    "unet": {"size": "tiny", "width": 8, "num_blocks": 1, "num_heads": 2},
}
# What a set says for each condition, and something a person may ask for.
DATA: dict[str, tuple[ConditionFacts, str]] = {
    "label": (label.described(4, ["a", "b", "c", "d"]), "c"),
    "vector": (ConditionFacts("vector", {"vector": ArrayFacts((3,), "float32")}), "1,2,3"),
    "text": (
        text.described(
            "clip", 3, {"text": np.ones(6, "f2"), "text_tokens": np.ones((4, 6), "f2")}, 9
        ),
        "a prompt",
    ),
    "image": (image.described((2, 4, 4), Space.pixels(2)), "picture.npy"),
}
MODELS = kinds.names("model")
# What is made from the samples is in no data, is never dropped, and cannot be asked for; see tests/unit/conditions.
MADE = ["augment"]
CONDITIONS = [kind for kind in kinds.names("conditions") if kind not in MADE]
BATCH = 5
SAMPLES = Facts((1, 8, 8), Space.pixels(1))


def condition(kind: str, dropout: float) -> Condition:
    if kind in MADE:
        section = kinds.config_of("conditions", kind)
        module = kinds.find("conditions", kind)
        return module.build(section, kind, module.made(section, kind, SAMPLES))
    section = kinds.config_of("conditions", {"kind": kind, "dropout": dropout})
    return kinds.find("conditions", kind).build(section, kind, DATA[kind][0])


def stored(kind: str, num: int) -> dict[str, torch.Tensor]:
    """Arrays as a source reads them."""
    generator = torch.Generator().manual_seed(num)
    found = {}
    for name, array in DATA[kind][0].arrays.items():
        if name == "text_count":
            found[name] = torch.randint(1, 4, (num,), generator=generator)
        elif array.dtype == "uint8":  # which sources give as int64
            found[name] = torch.randint(256, (num, *array.shape), generator=generator)
        elif array.dtype == "int64":
            found[name] = torch.randint(
                DATA[kind][0].num_values, (num, *array.shape), generator=generator
            )
        else:
            found[name] = torch.randn(num, *array.shape, generator=generator).to(
                getattr(torch, array.dtype)
            )
    return found


def test_every_member_is_here() -> None:
    assert set(MODELS) == set(SMALL) and set(CONDITIONS) == set(DATA), "add its lines above"


@pytest.mark.parametrize("kind", CONDITIONS)
def test_what_is_dropped_is_none_and_addressed(kind: str) -> None:
    one, arrays = condition(kind, 0.5), stored(kind, 400)
    assert one.facts == replace(DATA[kind][0], null=True)
    told = one.drop(arrays, 1, 2, 0)
    assert all(f"{name}_".startswith(f"{kind}_") for name in told)
    null = one.null(400, "cpu")
    kept = condition(kind, 0.0).drop(arrays, 1, 2, 0)
    assert told.keys() == null.keys() == kept.keys()
    for name in told:
        flat = [
            each[name].flatten(1) if each[name].dim() > 1 else each[name][:, None]
            for each in (told, null, kept)
        ]
        is_null, is_kept = (flat[0] == flat[1]).all(1), (flat[0] == flat[2]).all(1)
        assert (is_null | is_kept).all() and 140 < int(is_null.sum()) < 260
        late = one.drop({key: value[100:] for key, value in arrays.items()}, 1, 2, 100)
        assert torch.equal(late[name], told[name][100:])
        assert not torch.equal(one.drop(arrays, 1, 3, 0)[name], told[name])
        assert not torch.equal(one.drop(arrays, 2, 2, 0)[name], told[name])


# A prompt is read by a CLIP; see tests/unit/conditions/test_text.py.
@pytest.mark.parametrize("kind", [kind for kind in CONDITIONS if kind != "text"])
def test_what_is_asked_for_is_what_training_tells(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("picture.npy", np.zeros((2, 4, 4), "u1"))
    one = condition(kind, 0.1)
    trained, asked = one.drop(stored(kind, 2), 0, 0, 0), one.asked([DATA[kind][1]] * 2)
    default, null = one.default(range(2)), one.null(2, "cpu")
    for other in (asked, default, null):
        assert other.keys() == trained.keys()
        for name in trained:
            assert (
                other[name].shape == trained[name].shape
                and other[name].dtype == trained[name].dtype
            )
    with pytest.raises(ValueError):
        one.asked(["no such thing"])
    never = condition(kind, 0.0)
    assert not never.facts.null
    with pytest.raises(ValueError, match=f"conditions.{kind}.dropout"):
        never.null(1, "cpu")


@pytest.mark.parametrize("kind", MADE)
def test_what_is_made_from_samples_is_addressed(kind: str) -> None:
    one, x0 = condition(kind, 0.0), torch.randn(40, *SAMPLES.shape)
    assert isinstance(one, Augmenting) and one.facts.null
    changed, told = one.augment(x0, 1, 2, 0)
    assert changed.shape == x0.shape and not torch.equal(changed, x0)
    late, told_late = one.augment(x0[10:], 1, 2, 10)
    assert torch.equal(late, changed[10:])
    null, default = one.null(40, "cpu"), one.default(range(40))
    assert told.keys() == null.keys() == default.keys()
    for name in told:
        assert torch.equal(told_late[name], told[name][10:])
        assert null[name].shape == default[name].shape == told[name].shape
        assert not torch.equal(one.augment(x0, 1, 3, 0)[1][name], told[name])
        assert not torch.equal(one.augment(x0, 2, 2, 0)[1][name], told[name])
    with pytest.raises(ValueError):
        one.asked(["1"])


@pytest.mark.parametrize("kind", CONDITIONS)
def test_what_is_noised_is_addressed_and_keeps_none(kind: str) -> None:
    section = kinds.config_of("conditions", {"kind": kind, "dropout": 0.5})
    if "noise" not in type(section).model_fields:
        assert not isinstance(condition(kind, 0.5), Noising)
        return
    section = section.model_copy(update={"noise": 0.9})
    one = kinds.find("conditions", kind).build(section, kind, DATA[kind][0])
    assert isinstance(one, Noising) and isinstance(one, Mirroring)
    told, null = one.drop(stored(kind, 40), 1, 2, 0), one.null(40, "cpu")
    blurred = one.noised(told, 1, 2, 0)
    late = one.noised({name: each[10:] for name, each in told.items()}, 1, 2, 10)
    assert blurred.keys() == told.keys()
    for name, each in blurred.items():
        assert torch.equal(each[10:], late[name])
        is_null, was_null = (
            (some[name] == null[name]).reshape(40, -1).all(1) for some in (blurred, told)
        )
        assert torch.equal(is_null, was_null) and 10 < int(was_null.sum()) < 30
        for seed, step in ((1, 3), (2, 2)):
            assert not torch.equal(one.noised(told, seed, step, 0)[name], each)


def build(
    kind: str, names: tuple[str, ...], num_outputs: int, seed: int = 0
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    conditions = {name: condition(name, 0.1) for name in names}
    facts = Facts(
        (1, 8, 8), Space.pixels(1), {name: each.facts for name, each in conditions.items()}
    )
    config = kinds.config_of("model", {"kind": kind, **SMALL[kind]})
    model = kinds.find("model", kind).build(
        config, facts, num_outputs, seed=seed, dtype=torch.float32
    )
    told: dict[str, torch.Tensor] = {}
    for name, each in conditions.items():
        if isinstance(each, Augmenting):
            told |= each.augment(torch.zeros(BATCH, *facts.shape), 0, 0, 0)[1]
        else:
            told |= each.drop(stored(name, BATCH), 0, 0, 0)
    return model, told


@pytest.mark.parametrize("num_outputs", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_a_network_is_told_any_of_what_it_takes(kind: str, num_outputs: int) -> None:
    takes = kinds.find("model", kind).TAKES
    for names in [(), *((name,) for name in takes), tuple(takes)]:
        model, told = build(kind, names, num_outputs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02)
        x, time_B = torch.randn(BATCH, 1, 8, 8), torch.arange(BATCH).float() * 100
        out = model(x, time_B, **told)
        assert out.shape == (BATCH, num_outputs, 8, 8) and torch.isfinite(out).all()
        torch.testing.assert_close(
            out[2:4], model(x[2:4], time_B[2:4], **{k: v[2:4] for k, v in told.items()})
        )
        passes = getattr(model, "passes", lambda seed, address: [(1.0, {})])
        for share, further in passes(
            0, torch.tensor([1, 2])
        ):  # a batch's passes reach every weight
            (share * model(x, time_B, **told, **further).square().sum()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        if told:
            with pytest.raises((ValueError, TypeError)):
                model(x, time_B)


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_file_offers(kind: str) -> None:
    module = kinds.find("model", kind)
    one, again, other = (build(kind, ("label",), 1, seed)[0] for seed in (3, 3, 4))
    pairs = list(zip(one.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(
        not torch.equal(a, c) for a, _, c in pairs
    )
    model: Any = one
    assert model.num_outputs == 1 and model.facts.shape == (1, 8, 8)
    assert module.macs_per_sample(model.config, model.facts, 1) > 0
    assert set(getattr(module, "COMPUTE_KEYS", ())) <= set(type(model.config).model_fields)
    for name, parameter in inspect.signature(type(one).forward).parameters.items():
        assert name not in module.TAKES or parameter.kind is inspect.Parameter.KEYWORD_ONLY
    on_meta = module.build(model.config, model.facts, 1, device="meta")
    assert all(p.is_meta for p in on_meta.parameters())
    assert on_meta.state_dict().keys() == one.state_dict().keys()


def test_a_condition_that_a_network_does_not_take_is_named_with_the_cure() -> None:
    strange = {"camera": ConditionFacts("vector", {"camera": ArrayFacts((2,), "float32")})}
    facts = Facts((1, 8, 8), Space.pixels(1), strange)
    with pytest.raises(
        ValueError, match=r"'camera', which model\.kind=dit .* conditions\.camera=null"
    ):
        refuse_unknown_conditions(kinds.find("model", "dit"), facts, "dit")
