"""What a configuration is written in: values as people mean them, and no file that hangs, grows or loops."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from speed_engine.config import ConfigError, build, load
from speed_engine.config.yaml_values import parse

BASE = "base: digits_dit_tiny\n"


@pytest.fixture
def written(tmp_path):
    def write(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("1e+3", 1000.0),
        ("2E-4", 2e-4),
        ("-1.5e2", -150.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("010", 10),
        ("1_000", 1000),
        ("-7", -7),
        ("0x10", 16),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("n", "n"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e3'", "1e3"),
        ("1e", "1e"),
        ("B/2", "B/2"),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
        ("{a: &x {b: 1}, c: *x}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_values_are_what_they_look_like(text, value):
    assert parse(text, "here") == value
    assert type(parse(text, "here")) is type(value)


def test_numbers_of_a_configuration():
    config = load("digits_dit_tiny", ["train.steps=1e3", "optim.lr=2e-4", "train.flip=on"])
    assert (config.train.steps, config.optim.lr, config.train.flip) == (1000, 2e-4, True)
    assert load("digits_dit_tiny", ["train.steps=010"]).train.steps == 10
    assert load("digits_dit_tiny", ["engine=torch", "engine.compile=off"]).engine.compile == "off"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=1e20", ["train.steps", "too large"]),
        ("train.steps=100000000", ["train.steps", "99999999"]),  # nine digits name no checkpoint
        ("train.steps=1.5", ["train.steps", "integer"]),
        (f"train.steps={'9' * 5000}", ["train.steps"]),
        ("train.global_batch=1e11", ["train.global_batch", str(2**24)]),
        ("train.global_batch=1e20", ["train.global_batch", "too large"]),
        ("schedule.num_steps=1e12", ["schedule.num_steps", str(2**20)]),
        ("optim.lr=.inf", ["optim.lr", "finite"]),
        ("optim.lr=.nan", ["optim.lr", "finite"]),
        ("optim.lr=1e999", ["optim.lr", "finite"]),
        ("train.steps=[" + "1," * 500 + "]", ["train.steps", "integer"]),
        ("train={3: 4}", ["train={3: 4}", "key '3' is not a word"]),
        ("train={[a]: 4}", ["key is not a word"]),
        ("train={steps: 4, steps: 5}", ["'steps' appears twice"]),
        ("train=&a {steps: *a}", ["contains itself"]),
        ("train=" + "[" * 5000, ["train", "too deep"]),
        ("train" + ".a" * 3000 + "=1", ["unknown key train.a"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_mistakes_are_named(override, words):
    with pytest.raises(ConfigError) as caught:
        load("digits_dit_tiny", [override])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{n}: &a{n} {{b: *a{n - 1}, c: *a{n - 1}}}\n" for n in range(1, 60)),
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60)),
    ],
    ids=["lists", "mappings", "merges"],
)
def test_an_alias_bomb_is_refused_at_once(written, text):
    started = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"mine\.yaml, line \d+ stands for more than 10000 values"
    ):
        load(written(BASE + text))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: &a {steps: *a}\n", ["line 2", "contains itself"]),
        ("train: &a [*a]\n", ["line 2", "contains itself"]),
        ("3: 4\n", ["line 2", "the key '3' is not a word"]),
        ("train: {true: 4}\n", ["the key 'true' is not a word"]),
        ("train: {null: 4}\n", ["the key 'null' is not a word"]),
        ("train: {[1, 2]: 4}\n", ["line 2", "the key is not a word"]),
        ("? {a: 1}\n: 4\n", ["the key is not a word"]),
        ("train: " + "{a: " * 3000, ["too deep"]),
        ("train: !!python/object/apply:os.system [ls]\n", ["not valid YAML", "python/object"]),
        ("train: {steps: 4\n", ["not valid YAML", "line"]),
        ("train: {steps: !!int abc}\n", ["mine.yaml", "abc"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_files_that_mean_nothing_are_named(written, text, words):
    with pytest.raises(ConfigError) as caught:
        load(written(BASE + text))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bases_in_a_circle(written, tmp_path):
    one, two = written("", "one.yaml"), written("", "two.yaml")
    Path(one).write_text(f"base: {two}\n")
    Path(two).write_text(f"base: {one}\n")
    for path in (one, two):
        with pytest.raises(ConfigError, match=r"\.yaml is its own base, through .*\.yaml"):
            load(path)
    Path(two).write_text(f"base: {two}\n")
    with pytest.raises(ConfigError, match="is its own base"):
        load(one)
    Path(two).write_text(BASE + "seed: 7\n")
    assert load(one).seed == 7


MODEL = "model: {kind: dit, size: tiny/2}\ndata: {kind: digits}\n"


@pytest.mark.parametrize(
    "engine",
    ["", "engine:\n", "engine: {}\n", "engine: deepspeed\n", "engine: {kind: deepspeed}\n"],
)
def test_a_setting_of_a_section_that_names_no_kind(written, engine):
    path = written(MODEL + engine)
    config = load(path, ["engine.precision=bf16"])
    assert (config.engine.kind, config.engine.precision) == ("deepspeed", "bf16")
    assert load(path).engine.kind == "deepspeed"
    for words in (["engine.precision=autocast", "engine=torch"], ["engine={kind: torch}"]):
        assert load(path, words).engine.kind == "torch"
    assert load(path, ["schedule.num_steps=50"]).schedule.num_steps == 50
    with pytest.raises(ConfigError, match=r"unknown key timesteps\.k"):
        load(path, ["timesteps.k=5"])  # uniform has none
    assert build(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "section", ["train", "optim", "log", "checkpoint", "kernels", "conditions"]
)
def test_an_empty_section_is_an_absent_one(written, section):
    assert load(written(MODEL + f"{section}:\n")) == load(written(MODEL))


def test_through_the_command_line(written):
    """One sentence and exit code 2, as from every command."""
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    command = [sys.executable, "-m", "speed_engine", "plan", "--config", written(BASE + bomb)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
