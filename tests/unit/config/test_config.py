"""The configuration: presets load, overrides merge, every mistake is one helpful sentence."""

import pytest

from speed_engine import config, kinds
from speed_engine.config import ConfigError, build, load, merge, parse_overrides, presets


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_survives_a_round_trip(name):
    first = load(name)
    assert build(first.model_dump(mode="json")) == first


@pytest.mark.parametrize("section", config.KINDS)
def test_every_kind_has_a_typed_config(section):
    for kind in kinds.names(section):
        module = kinds.find(section, kind)
        assert module.Config.model_fields["kind"].default == kind
        assert module.Config.model_config["extra"] == "forbid"
        assert module.Config.model_config["frozen"]


def test_overrides():
    changed = load("digits_dit_tiny", ["optim.lr=3e-4", "train.steps=7", "engine=torch"])
    assert changed.optim.lr == 3e-4  # YAML 1.1 reads 3e-4 as text
    assert changed.train.steps == 7
    assert changed.engine.kind == "torch"


def test_another_kind_drops_the_old_kinds_keys():
    """`timesteps.kind=uniform` must not inherit SpeeD's k, lam and tau."""
    changed = load("digits_dit_tiny", ["timesteps.kind=uniform"])
    assert changed.timesteps.kind == "uniform"
    kept = load("digits_dit_tiny", ["timesteps.k=7"])
    assert (kept.timesteps.k, kept.timesteps.lam) == (7, 0.6)
    both = parse_overrides(["engine=torch", "engine.precision=bf16"])
    assert merge({"engine": {"kind": "deepspeed", "zero": 3}}, both) == {
        "engine": {"kind": "torch", "precision": "bf16"}
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("timesteps.kk=3", ["timesteps.kk", "did you mean 'k'"]),
        ("conditions.image={noise: 1}", ["conditions.image.noise: ", "less than 1"]),
        ("conditions.image={noize: 0}", ["conditions.image.noize", "did you mean 'noise'"]),
        ("conditions.mine={kind: label, dropuot: 0}", ["conditions.mine.dropuot", "'dropout'"]),
        (
            "timesteps={kind: combine, parts: [p2, {kind: speed, lem: 1}]}",
            ["timesteps.parts.1.lem", "did you mean 'lam'"],
        ),
        (
            "timesteps={kind: curriculum, first: {kind: speed, lem: 1}, at: 1, then: uniform}",
            ["timesteps.first.lem", "did you mean 'lam'"],
        ),
        ("timestep.k=3", ["timestep", "did you mean 'timesteps'"]),
        ("timesteps.kind=spede", ["timesteps.kind", "did you mean 'speed'", "uniform"]),
        ("timesteps.k=0.2", ["timesteps.k", "greater than or equal to 1", "0.2"]),
        ("timesteps.lam=1.5", ["timesteps.lam", "less than or equal to 1"]),
        ("optim.lr=fast", ["optim.lr", "valid number"]),
        ("train.global_batch=0", ["train.global_batch"]),
        ("engine.zero=7", ["engine.zero"]),
        ("model.size=XXL/2", ["XXL/2", "XL/2"]),
        ("model=3", ["model.kind", "dit"]),
        ("steps", ["steps", "section.key=value"]),
        ("timesteps.kind=no.such.module", ["no.such.module"]),
    ],
)
def test_mistakes_are_named(override, words):
    with pytest.raises(ConfigError) as caught:
        load("digits_dit_tiny", [override])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_thresholds_are_refused():
    with pytest.raises(ConfigError, match=r"timesteps\.tau and timesteps\.r both name"):
        load("digits_dit_tiny", ["timesteps.tau=700", "timesteps.r=139"])


def test_unknown_preset_lists_what_exists():
    with pytest.raises(ConfigError, match=r"did you mean 'digits_dit_tiny'.*imagenet256_dit_xl2"):
        load("digits_dit_tyni")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  steps: 3\n  steps: 4\n", ["line 3", "'steps'", "twice"]),
        ("train:\n\tsteps: 3\n", ["not valid YAML", "line 2"]),
        ("- a\n- b\n", ["mapping"]),
        ("base: nowhere\n", ["nowhere", "presets are"]),
    ],
)
def test_bad_files_are_named(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    for word in words:
        assert word in str(caught.value)


def test_a_twice_given_override_is_refused():
    with pytest.raises(ConfigError, match="given twice"):
        load("digits_dit_tiny", ["seed=1", "seed=2"])


def test_nothing_can_be_changed_later():
    loaded = load("digits_dit_tiny")
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 3
