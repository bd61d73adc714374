"""The list of keys: whole, explained, and the same on the page beside DESIGN.md."""

from pathlib import Path

import pytest

import speed_engine
from speed_engine.config import RunConfig, load, presets
from speed_engine.kinds import SECTIONS, ConfigError, names
from speed_engine.reports import keys

GROUPS = keys.groups()


def test_the_page_is_what_the_command_writes():
    page = Path(speed_engine.__file__).parent / "KEYS.md"
    assert page.read_text(encoding="utf-8") == keys.as_markdown() + "\n", (
        "write it anew: python -m speed_engine keys --markdown > speed_engine/KEYS.md"
    )


def test_every_key_says_what_it_is_for():
    assert not [key.name for group in GROUPS for key in group.keys if not key.meaning]
    assert not [group.title for group in GROUPS if not group.about]


def test_every_kind_and_section_is_there():
    titles = {group.title for group in GROUPS}
    for section in keys.KINDS:
        assert {f"{section}.kind={kind}" for kind in names(section)} <= titles
    sections = {group.title.split(".")[0] for group in GROUPS}
    plain = {"name", "run_dir", "seed", "learned_variance"}
    assert sections == set(RunConfig.model_fields) - plain | {"run"}
    assert set(keys.KINDS) | {"conditions"} <= set(SECTIONS)


@pytest.mark.parametrize("preset", presets())
def test_every_key_of_a_preset_is_listed(preset):
    known = {key.name for group in GROUPS for key in group.keys}
    for section, value in load(preset).model_dump(mode="json").items():
        if isinstance(value, dict) and section != "conditions":
            assert {f"{section}.{key}" for key in value if key != "kind"} <= known


def test_one_kind():
    (speed,) = keys.groups("timesteps", "speed")
    by_name = {key.name: key for key in speed.keys}
    assert by_name["timesteps.k"] == keys.Key(
        "timesteps.k", "number >= 1", "5", by_name["timesteps.k"].meaning
    )
    assert by_name["timesteps.tau"].takes == "whole number | null >= 1"
    text = keys.as_text([speed])
    assert text.startswith("timesteps.kind=speed   SpeeD as in the paper")
    assert "timesteps.k = number >= 1 (default 5)" in text


@pytest.mark.parametrize(
    ("section", "kind", "said"),
    [
        ("trian", None, "did you mean 'train'"),
        ("timesteps", "sped", "did you mean 'speed'"),
        ("train", "speed", "train has no kinds"),
    ],
)
def test_a_wrong_name_is_told(section, kind, said):
    with pytest.raises(ConfigError, match=said):
        keys.groups(section, kind)
