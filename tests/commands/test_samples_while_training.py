"""Grids of samples while training runs: which pictures, which scores, and that they change nothing else of the run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

GRIDS = ["sample.every=10", "sample.num=20", "sample.steps=5", "sample.guidance=1.5"]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def grid(run: Path, step: int) -> np.ndarray:
    with Image.open(run / "grids" / f"step-{step:08d}.png") as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def train(good, overrides):
    """train(run folder, overrides...) -> what was said: the tiny run, with these settings in place of its own."""

    def command(run: Path, *changes: str) -> str:
        changed = {word.split("=")[0] for word in changes}
        words = [word for word in overrides(run) if word.split("=")[0] not in changed]
        answer = good("train", "--config", "digits_dit_tiny", *words, *changes)
        return answer.out + answer.err

    return command


@pytest.fixture(scope="module")
def watched(train, tmp_path_factory):
    """The folder of the tiny run that drew grids of what `samples` holds: read it, change copies only."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    train(folder, *GRIDS, "log.tensorboard=true")
    return folder


def test_grid_and_scores_are_those_of_the_commands(watched, samples, read_json):
    """Of the same weights with the same settings, `sample` draws the same picture and `score` says the same."""
    with Image.open(samples / "grid.png") as picture:
        np.testing.assert_array_equal(grid(watched, 20), np.asarray(picture))
    assert (grid(watched, 10) != grid(watched, 20)).any()
    report, line = read_json(samples / "score.json"), lines_of(watched)[-1]
    assert line["sample_class_agreement"] == report["class_agreement"]["agreement"]
    assert line["sample_frechet_distance"] == report["frechet"]["same_size"]["mean"]


def test_a_grid_unclipped_with_guidance_that_grows(train, watched, good, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(watched, run)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    train(run, *GRIDS, "sample.clip=false", "sample.guidance_power=4")
    assert (grid(run, 20) != grid(watched, 20)).any()
    words = ["--num", "20", "--sampler", "ddim", "--steps", "5", "--guidance", "1.5"]
    words += ["--no-clip", "--guidance-power", "4"]
    good("sample", "--run", run, *words, "--out", tmp_path / "drawn")
    with Image.open(tmp_path / "drawn" / "grid.png") as picture:
        np.testing.assert_array_equal(grid(run, 20), np.asarray(picture))


def test_grids_change_nothing_else(watched, run):
    kept = ("loss", "loss_by_t", "grad_norm", "lr")
    for mine, theirs in zip(lines_of(watched), lines_of(run), strict=True):
        assert [mine[key] for key in kept] == [theirs[key] for key in kept]
    name = Path("checkpoints") / "step-00000020" / "ema.safetensors"
    mine, theirs = load_file(watched / name), load_file(run / name)
    assert all((mine[key] == theirs[key]).all() for key in theirs)


def test_tensorboard_gets_the_pictures(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(watched / "tensorboard")).Reload()
    assert [event.step for event in shown.Images("samples")] == [10, 20]
    height, width, _ = grid(watched, 20).shape
    assert [(event.height, event.width) for event in shown.Images("samples")] == [
        (height, width)
    ] * 2


def test_a_resume_draws_the_same_grid(train, watched, tmp_path):
    """Also one that began without grids: they are no part of what a resume compares."""
    shutil.copytree(watched, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    shutil.rmtree(tmp_path / "run" / "grids")
    train(tmp_path / "run", *GRIDS)
    np.testing.assert_array_equal(grid(tmp_path / "run", 20), grid(watched, 20))
    train(tmp_path / "run", "train.steps=21", *GRIDS[1:], "sample.every=20")
    assert grid(tmp_path / "run", 21).shape == grid(watched, 20).shape  # the end of a run is shown


def test_what_goes_wrong_is_one_warning(train, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "grids").write_text("a file in the folder's place")
    settings = ["train.steps=24", "log.every=2", "sample.every=2", "sample.steps=1"]
    said = train(tmp_path / "run", *settings)
    assert said.count("WARNING") == 1 and "WARNING: samples at step 22: " in said
    failed = [line["sample_failed"] for line in lines_of(tmp_path / "run")[2:]]
    assert len(failed) == 2 and all("grids" in reason for reason in failed)
    assert "finished: step 24" in said


def test_the_plan_states_their_cost(good, data):
    words = ["sample.every=100", "sample.num=60", "sample.steps=32", f"data.path={data}"]
    answer = good("plan", "--config", "digits_dit_tiny", "sample.guidance=2", *words)
    # 60 x 32 x 2 forward passes for 100 x 128 forward and backward passes of three times the work.
    assert "samples         60 every 100 steps: 10.0% of the training's FLOP" in answer.out
