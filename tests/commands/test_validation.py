"""The validation loss as a run writes it: the same whatever trains, at any split, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

VALIDATED = ["validation.every=10", "validation.samples=100", "validation.rows=3"]


@pytest.fixture(scope="module")
def judged(good, overrides, run, read_lines):
    """judged(folder, words) -> its lines, of a run that starts from trained weights and leaves them as they are."""

    def lines(folder: Path, *words: str, steps: int = 10) -> list[dict[str, Any]]:
        given = {word.split("=")[0] for word in words} | {"train.steps", "optim.lr"}
        if "timesteps.kind" in given:
            given.add("timesteps.k")
        kept = [word for word in overrides(folder) if word.split("=")[0] not in given]
        begun = [f"train.init_from={run}", "optim.lr=0", f"train.steps={steps}"]
        good("train", "--config", "digits_dit_tiny", *kept, *begun, *VALIDATED, *words)
        return read_lines(folder)

    return lines


@pytest.fixture(scope="module")
def read_lines():
    from speed_engine.training import metrics_file

    return lambda folder: metrics_file.read(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def expected(judged, tmp_path_factory) -> dict[str, Any]:
    (line,) = judged(tmp_path_factory.mktemp("judged") / "run")
    return numbers(line)


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("validation_")}


def test_what_a_line_holds(expected):
    assert 0 < expected["validation_loss"] < 1.5 and expected["validation_loss_se"] > 0
    assert {"validation_x0", "validation_x0_se", "validation_v", "validation_v_se"} < set(expected)
    by = expected["validation_by_log_snr"]
    assert sum(by["count"]) == 300 and len(by["edges"]) == len(by["eps"]) + 1 == 17


@pytest.mark.parametrize(
    "words",
    [
        ["timesteps.kind=uniform"],
        ["timesteps.kind=adaptive"],
        ["train.micro_batch=4"],
        ["seed=5", "conditions.label.dropout=0.3"],
        ["engine=deepspeed", "engine.zero=1"],
    ],
    ids=lambda words: words[0],
)
def test_nothing_but_the_weights_moves_it(judged, expected, tmp_path, words):
    (line,) = judged(tmp_path / "run", *words)
    assert numbers(line) == expected


def test_it_is_the_same_after_a_resume(judged, expected, tmp_path):
    judged(tmp_path / "run")
    lines = judged(tmp_path / "run", steps=20)
    assert [line["step"] for line in lines] == [10, 20]
    assert numbers(lines[0]) == numbers(lines[1]) == expected


def test_it_falls_while_a_run_learns_and_is_drawn(
    good, overrides, is_a_picture, read_json, read_lines, tmp_path
):
    folder = tmp_path / "run"
    good("train", "--config", "digits_dit_tiny", *overrides(folder), *VALIDATED)
    first, last = read_lines(folder)
    assert last["validation_loss"] < first["validation_loss"] - 2 * first["validation_loss_se"]
    manifest = read_json(folder / "manifest.json")
    assert manifest["data"]["num_samples"] == 1697
    assert manifest["validation"]["samples"] == 100
    good("plot", "--run", folder)
    for name in ("validation", "validation_by_log_snr"):
        assert is_a_picture(folder / "plots" / f"{name}.png")
    assert (
        f"validation_loss          {last['validation_loss']:.4g}"
        in good("summary", "--run", folder).out
    )
    plan = good("plan", "--config", "digits_dit_tiny", *overrides(folder), *VALIDATED).out
    assert "100 held-out samples every 10 steps: 62.5% of the training's FLOP" in plan


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["validation.every=15"], ["validation.every=15", "log.every=10"]),
        (["validation.samples=1000"], ["validation.samples=1000", "1797"]),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(command, overrides, tmp_path, words, named):
    words = ["validation.every=10", *words] if "every" not in words[0] else words
    answer = command("train", "--config", "digits_dit_tiny", *overrides(tmp_path / "x"), *words)
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert all(word in answer.err for word in named)
    assert not (tmp_path / "x").exists()
