"""Weights that come in: samples from a file alone, and runs that start from weights of elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

NEWEST = Path("checkpoints") / "step-00000020"
SAMPLE = ["--num", "6", "--sampler", "ddim", "--steps", "4", "--guidance", "1.5"]


@pytest.fixture(scope="module")
def forms(good, run, tmp_path_factory) -> dict[str, Path]:
    """The run's averages in every form that `--weights` takes."""
    folder = tmp_path_factory.mktemp("forms")
    good("export", "--run", run, "--out", folder / "exported.safetensors")
    good("export", "--run", run, "--out", folder / "diffusers", "--format", "diffusers")
    torch.save({"ema": load_file(run / NEWEST / "ema.safetensors")}, folder / "public.pt")
    return {
        "checkpoint": run / NEWEST / "ema.safetensors",
        "exported": folder / "exported.safetensors",
        "public": folder / "public.pt",
        "diffusers": folder / "diffusers",
    }


@pytest.fixture(scope="module")
def expected(good, run, tmp_path_factory) -> np.ndarray:
    out = tmp_path_factory.mktemp("of_the_run") / "samples"
    good("sample", "--run", run, "--out", out, *SAMPLE)
    return pictures(out)


def pictures(folder: Path) -> np.ndarray:
    from PIL import Image

    files = sorted((folder / "images").iterdir())
    assert len(files) == 6
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


@pytest.mark.parametrize("form", ["checkpoint", "exported", "public", "diffusers"])
def test_samples_of_a_file_are_those_of_its_run(good, forms, expected, tmp_path, form):
    answer = good("sample", "--weights", forms[form], "--out", tmp_path / "out", *SAMPLE)
    assert np.abs(pictures(tmp_path / "out") - expected).max() <= (1 if form == "diffusers" else 0)
    assumed = "do not say their schedule" in answer.out
    assert assumed == (form == "public")


def test_what_the_file_does_not_say_can_be_said(good, command, forms, expected, tmp_path):
    words = ["sample", "--weights", forms["public"], *SAMPLE]
    answer = good(*words, "--out", tmp_path / "a", "schedule.kind=cosine", "objective.kind=epsilon")
    assert "do not say" not in answer.out
    assert np.abs(pictures(tmp_path / "a") - expected).max() > 1
    other = command(*words, "--out", tmp_path / "a")  # another schedule, same folder
    assert other.code == 2 and "another recipe" in other.err


def begin(good, overrides, folder: Path, *words: str | Path, steps: int = 1) -> str:
    """One step at rate 0 from given weights: the checkpoint holds what the run started with."""
    kept = [word for word in overrides(folder) if not word.startswith(("train.steps", "optim.lr"))]
    return good(
        "train", "--config", "digits_dit_tiny", *kept, f"train.steps={steps}", "optim.lr=0", *words
    ).out


@pytest.mark.parametrize("form", ["run", "checkpoint", "public", "diffusers"])
def test_a_run_starts_from_weights(good, overrides, run, forms, read_json, tmp_path, form):
    path = run if form == "run" else forms[form]
    said = begin(good, overrides, tmp_path / "new", f"train.init_from={path}")
    assert f"weights of {path.name}" in said
    theirs = load_file(forms["checkpoint"])
    ours = load_file(tmp_path / "new" / "checkpoints" / "step-00000001" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    init = read_json(tmp_path / "new" / "manifest.json")["init"]
    assert init["new"] == init["left_out"] == [] and init["taken"] == len(ours) - 1


def test_what_does_not_fit_is_made_new_and_said(good, overrides, run, tmp_path):
    said = begin(
        good, overrides, tmp_path / "new", f"train.init_from={run}", "conditions.label=null",
        "learned_variance=false", "train.init_weights=model",
    )  # fmt: skip
    assert "left out: y_embedder.embedding_table.weight" in said
    assert "made new: final_layer.linear.bias, final_layer.linear.weight" in said
    theirs = load_file(run / NEWEST / "model.safetensors")
    ours = load_file(tmp_path / "new" / "checkpoints" / "step-00000001" / "model.safetensors")
    block = "blocks.0.mlp.fc1.weight"
    assert torch.equal(theirs[block], ours[block])
    assert not ours["final_layer.linear.weight"].any()


def test_a_run_that_was_started_so_resumes(good, overrides, run, read_json, tmp_path):
    begin(good, overrides, tmp_path / "new", f"train.init_from={run}")
    manifest = read_json(tmp_path / "new" / "manifest.json")
    said = begin(good, overrides, tmp_path / "new", f"train.init_from={run}", steps=2)
    assert "tensors taken" not in said
    assert read_json(tmp_path / "new" / "manifest.json")["init"] == manifest["init"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train.init_from={new}"], ["{new}", "no file or folder"]),
        (["train.init_from={file}"], ["{file}"]),
        (["train.init_from={run}", "model.hidden_size=48"], ["{run}", "fits", "model.*"]),
    ],
)
def test_weights_that_cannot_be_taken(command, overrides, run, tmp_path, words, named):
    (tmp_path / "file").write_text("no weights")
    places = {"run": run, "file": tmp_path / "file", "new": tmp_path / "new"}
    words = [word.format(**places) for word in words]
    answer = command("train", "--config", "digits_dit_tiny", *overrides(tmp_path / "x"), *words)
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert all(word.format(**places) in answer.err for word in named), answer.err
    assert not list((tmp_path / "x").glob("checkpoints/*"))
