"""The same command again: where a run goes on, in which folder, and how."""

import json
import shutil
from pathlib import Path

import pytest

from speed_engine.training import sealed


def numbers_of(run: Path) -> list[dict]:
    """The metrics without the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = {"images_per_s", "tflops_per_device", "mfu", "data_wait", "time"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def manifest_of(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


@pytest.fixture
def train(good, overrides):
    """train(run folder, overrides...): the tiny run, with these settings in place of its own."""

    def command(run, *changes: str):
        changed = {word.split("=")[0] for word in changes}
        words = [word for word in overrides(run) if word.split("=")[0] not in changed]
        return good("train", "--config", "digits_dit_tiny", *words, *changes)

    return command


def test_a_longer_run_goes_on_where_it_ended(train, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    answer = train(tmp_path / "run", "train.steps=24")
    assert "step 24/24" in answer.err and "step 10/24" not in answer.err
    lines = numbers_of(tmp_path / "run")
    assert lines[:2] == numbers_of(run)
    assert [line["step"] for line in lines] == [10, 20, 24]
    shutil.copytree(run, tmp_path / "resident")  # the same samples, from memory
    answer = train(tmp_path / "resident", "train.steps=24", "train.resident=auto")
    assert "samples are resident" in answer.err and numbers_of(tmp_path / "resident") == lines
    feeds = [manifest_of(tmp_path / name)["feed"] for name in ("run", "resident")]
    assert feeds[0].endswith("train.resident=false") and "samples are resident" in feeds[1]


def test_each_run_has_a_folder_of_its_own(train, tmp_path, monkeypatch):
    """Without run_dir, other settings never meet in one folder, and the same settings go on there."""
    monkeypatch.chdir(tmp_path)
    for changes in (["train.steps=2"], ["train.steps=2", "seed=1"], ["train.steps=3"]):
        train(None, "run_dir=", *changes)
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(f.name.startswith("digits_dit_tiny-") for f in folders)
    steps = [{int(c.name[5:]) for c in (f / "checkpoints").glob("step-*")} for f in folders]
    assert sorted(map(max, steps)) == [2, 3]


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ("sdpa_flash", "sdpa_flash", "as before the interruption: it was the fastest"),
        ("sdpa_cudnn", "sdpa", "torch's fused attention on cpu"),  # cannot run on this machine
    ],
)
def test_a_resumed_run_attends_as_before(train, run, tmp_path, before, now, reason):
    """Where attention is measured, a second measurement may come out differently."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "checkpoints" / "step-00000020" / "manifest.json"
    facts = sealed.read(path)
    assert facts["attention"]["backend"] == "sdpa"
    facts["attention"] |= {"backend": before, "reason": "it was the fastest"}
    path.write_text(json.dumps(sealed.seal(facts)))
    for steps in (22, 24):  # a reason is handed on, not piled up
        answer = train(copy, f"train.steps={steps}")
        warned = (
            "attention was computed by sdpa_cudnn before, and is by sdpa from here on"
            in answer.out + answer.err
        )
        assert warned == (before != now and steps == 22), answer
        resumed = json.loads((copy / "manifest.json").read_text())
        assert (resumed["attention"]["backend"], resumed["attention"]["reason"]) == (now, reason)


def test_the_line_of_an_interrupted_interval_is_that_of_an_undisturbed_run(train, run, tmp_path):
    """Stopped after step 15, between the lines of steps 10 and 20."""
    settings = ["checkpoint.every=5", "checkpoint.keep=9"]
    train(tmp_path / "run", *settings)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    answer = train(tmp_path / "run", *settings)
    assert "is at step 15" in answer.err
    assert numbers_of(tmp_path / "run") == numbers_of(run)


def test_a_run_says_where_it_begins_and_what_comes_next(train, good, tmp_path):
    answer = train(tmp_path / "run", "train.steps=1")
    assert "starts at step 0" in answer.err
    lines = answer.err.splitlines()
    told = [line.split("speed_engine ")[1] for line in lines if "-m speed_engine" in line]
    assert [words.split()[0] for words in told] == ["sample", "plot"]
    for words in told:
        brief = ["--num", "2", "--steps", "2"] if words.startswith("sample") else []
        good(*words.split(), *brief)
    assert (tmp_path / "run" / "samples" / "grid.png").exists()
