"""The study file: what it refuses, in one sentence, before anything runs; and the shipped ones."""

import copy

import pytest
import yaml

from speed_engine.config import ConfigError
from speed_engine.studies import study

SMALL = {
    "preset": "digits_dit_tiny",
    "overrides": {"engine": "torch"},
    "methods": {"uniform": {"timesteps": "uniform"}, "speed": {"timesteps": {"kind": "speed"}}},
    "seeds": [0, 1],
    "steps": 40,
    "cadence": 10,
    "metric": "mse",
}


@pytest.fixture
def file(tmp_path):
    """file(key=value, ...): a study file with these keys, dotted by __; None removes."""

    def write(**changes):
        tree = copy.deepcopy(SMALL)
        for key, value in changes.items():
            *above, last = key.split("__")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods__speed__timesteps": "sped"}, r"methods\.speed.*did you mean 'speed'"),
        ({"methods__speed__timesteps": {"kind": "speed", "kk": 5}}, r"unknown key timesteps\.kk"),
        ({"methods__speed__timesteps": {"kind": "speed", "tau": 2000}}, r"timesteps\.tau=2000"),
        ({"baseline": "unifrom"}, "baseline: there is no method 'unifrom'; did you mean 'uniform'"),
        ({"quick__methods__sped": {}}, "quick.methods: there is no method 'sped'"),
        ({"cadence": 12}, "cadence=12 does not divide steps=40 into at least 4"),
        ({"cadence": 20}, "choose a divisor of at most 10"),
        ({"metric": "fid"}, "metric: metrics.jsonl holds no 'fid'"),
        ({"metric": "los"}, "did you mean 'loss'"),
        ({"seeds": [0, 0]}, "seeds: every seed once"),
        ({"seeds": [0]}, "seeds: "),
        ({"cadance": 10}, "cadance: the study knows no such key; did you mean 'cadence'"),
        ({"methods__speed__seed": 3}, r"methods\.speed: seed is the same for every cell"),
        ({"overrides__train": {"steps": 9}}, r"overrides: train\.steps .* set the study's steps"),
        ({"methods__a/b": {}}, r"a/b"),
    ],
)
def test_mistakes_are_told_before_anything_runs(file, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        study.cells(study.load(file(**changes)))
    assert "\n" not in str(error.value)


def test_an_unknown_study_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"did you mean 'digits'\?; studies are: digits, digits_"):
        study.load("digit")


def test_cells_are_methods_by_seeds_by_settings(file):
    chosen = study.load(
        file(settings={"linear": {}, "cosine": {"schedule": "cosine"}}), ["steps=80"]
    )
    cells = study.cells(chosen)
    assert len(cells) == len({cell.name for cell in cells}) == 8
    assert {cell.seed for cell in cells[:4]} == {0}  # pairs are complete early
    last = cells[-1]
    assert last.name == "cosine/speed/seed1"
    assert last.tree["seed"] == 1 and last.tree["schedule"]["kind"] == "cosine"
    assert last.tree["train"] == {"steps": 80, "global_batch": 128}
    assert last.tree["log"]["every"] == 10 and "validation" not in last.tree
    assert chosen.reference == "uniform"


def test_quick_changes_the_name_and_what_it_says(file):
    over = {"timesteps": {"k": 2}}
    path = file(quick={"steps": 20, "cadence": 5, "seeds": [4, 5], "methods": {"speed": over}})
    quick = study.load(path, quick=True)
    assert (quick.name, quick.steps, quick.cadence, quick.seeds) == ("mine_quick", 20, 5, (4, 5))
    assert study.cells(quick)[1].tree["timesteps"] == {"kind": "speed", "k": 2, "lam": 0.6}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", study.studies())
def test_every_shipped_study_can_start(name, quick):
    """On a training metric, so that the cells' configurations are looked at without the validation loss."""
    chosen = study.load(name, ["metric=mse"], quick)
    cells = study.cells(chosen)
    assert len({str(cell.tree) for cell in cells}) == len(cells), "two cells are the same run"
    assert chosen.reference == "uniform" and chosen.about
    if quick:
        assert len(cells) <= 60 and chosen.steps <= 200
    else:
        assert len(chosen.seeds) >= 4
        assert study.load(name).metric == "validation_loss"


def test_speed_ends_in_uniform_at_two_thirds():
    for quick in (False, True):
        chosen = study.load("digits", ["metric=mse"], quick)
        assert chosen.methods["speed_then_uniform"]["timesteps"]["at"] * 3 == chosen.steps * 2
