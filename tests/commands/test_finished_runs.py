"""sample, score, plot, summary, export and import: what comes out of a run that is there."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

NEWEST = Path("checkpoints") / "step-00000020"

# ---------------------------------------------------------------------------------------------- sample


def pictures(folder: Path) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]
    )


def test_sample_draws_two_of_each_class(samples, read_json, is_a_picture):
    drawn = pictures(samples)
    assert drawn.shape == (20, 8, 8) and drawn.dtype == np.uint8
    assert len(np.unique(drawn)) > 20  # grey levels, not two of them
    assert len({picture.tobytes() for picture in drawn}) == 20
    archive = np.load(samples / "samples.npz")
    assert (archive["arr_0"][..., 0] == drawn).all()
    assert np.bincount(archive["labels"]).tolist() == [2] * 10
    recipe = read_json(samples / "recipe.json")
    assert (recipe["num"], recipe["sampler"], recipe["steps"]) == (20, "ddim", 5)
    assert recipe["guidance"] == 1.5 and recipe["source"]["step"] == 20
    assert is_a_picture(samples / "grid.png")


def words_of(recipe: dict, run: Path, out: Path) -> list:
    keys = ("num", "sampler", "steps", "guidance")
    settings = [word for key in keys for word in (f"--{key}", recipe[key])]
    return ["sample", "--run", run, "--out", out, *settings]


def test_sample_fills_in_what_is_missing_with_the_same_pictures(
    good, run, samples, tmp_path, read_json, listing
):
    copy = tmp_path / "samples"
    shutil.copytree(samples, copy)
    (copy / "grid.png").unlink()
    for number in (3, 17):
        (copy / "images" / f"{number:06d}.png").unlink()
    recipe = read_json(samples / "recipe.json")
    good(*words_of(recipe, run, copy), "--batch-size", "7")
    assert (pictures(copy) == pictures(samples)).all()
    whole = listing(copy)
    good(*words_of(recipe, run, copy))
    assert listing(copy) == whole  # finished: nothing is drawn again


def test_sample_takes_the_settings_it_is_given(good, run, samples, tmp_path, read_json):
    recipe = read_json(samples / "recipe.json") | {"num": 4}
    drawn = {}
    changes = {"class 3": ["--label", "3"], "seed": ["--seed", "5"]}
    changes |= {"weights": ["--weights", "model"], "channels": ["--guidance-channels", "1"]}
    for name, words in changes.items():
        good(*words_of(recipe, run, tmp_path / name), *words, "--device", "cpu")
        drawn[name] = pictures(tmp_path / name)
    assert np.load(tmp_path / "class 3" / "samples.npz")["labels"].tolist() == [3] * 4
    assert (drawn["class 3"][3] == pictures(samples)[3]).all()  # the noise of number 3, its class
    assert (drawn["class 3"][:3] != pictures(samples)[:3]).any()
    for name in ("seed", "weights"):
        assert (drawn[name] != pictures(samples)[:4]).any(), name
    assert (drawn["channels"] == pictures(samples)[:4]).all()  # one channel is all there are


def test_bf16_is_a_choice_that_the_folder_remembers(
    good, command, run, samples, tmp_path, read_json
):
    words = words_of(read_json(samples / "recipe.json"), run, tmp_path / "out")
    good(*words, "--precision", "bf16")
    difference = np.abs(pictures(tmp_path / "out").astype(int) - pictures(samples))
    assert 0 < difference.mean() < 5
    assert read_json(tmp_path / "out" / "recipe.json")["dtype"] == "bfloat16"
    answer = command(*words)
    assert answer.code == 2 and "dtype='bfloat16' (now 'float32')" in answer.err


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_every_sampler_draws(good, run, samples, tmp_path, read_json, sampler):
    recipe = read_json(samples / "recipe.json") | {"num": 2, "sampler": sampler}
    good(*words_of(recipe, run, tmp_path / "out"))
    assert pictures(tmp_path / "out").std() > 5


# ----------------------------------------------------------------------------------------------- score


def test_score_judges_the_samples(samples, read_json):
    score = read_json(samples / "score.json")
    assert score["num_samples"] == 20 and score["recipe"]["steps"] == 5
    agreement = score["class_agreement"]
    assert sum(c["samples"] for c in agreement["by_class"].values()) == 20
    right = sum(c["samples"] * c["agreement"] for c in agreement["by_class"].values())
    assert agreement["agreement"] == pytest.approx(right / 20)
    assert sum(score["predicted_share"].values()) == pytest.approx(1)
    frechet = score["frechet"]  # so little training draws no digits
    assert frechet["same_size"]["mean"] > 2 * frechet["floor"]["mean"] > 0


def test_score_knows_real_digits_when_it_sees_them(good, samples, tmp_path):
    """The scans themselves in the samples' place: the right classes, the floor's distance, copies."""
    from sklearn.datasets import load_digits

    scans, classes = load_digits(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(classes == c)[-2:] for c in range(10)])
    ink = np.round(scans[chosen] * (255 / 16)).astype(np.uint8).reshape(20, 8, 8)
    copy = tmp_path / "samples"
    shutil.copytree(samples, copy)
    for number, picture in enumerate(ink):
        Image.fromarray(picture).save(copy / "images" / f"{number:06d}.png")
    np.savez(copy / "samples.npz", arr_0=ink[..., None], labels=classes[chosen])
    answer = good("score", "--samples", copy, "--reference", "digits")
    score = json.loads((copy / "score.json").read_text())
    assert score["class_agreement"]["agreement"] >= 0.9
    assert score["memorisation"]["copies"] == 1
    assert score["frechet"]["same_size"]["mean"] < 1.5 * score["frechet"]["floor"]["mean"]
    assert str(score["class_agreement"]["agreement"]) in answer.out


# ---------------------------------------------------------------------------------------- plot, summary


def test_plot_draws_the_run(good, run, tmp_path, is_a_picture):
    answer = good("plot", "--run", run, "--out", tmp_path / "plots")
    drawn = sorted((tmp_path / "plots").iterdir())
    assert {Path(line) for line in answer.out.split()} == set(drawn)
    assert {"loss.png", "loss_by_t.png"} < {path.name for path in drawn} and len(drawn) == 4
    assert all(map(is_a_picture, drawn))


def test_plot_draws_several_runs_and_other_formats(
    good, command, run, tmp_path, is_a_picture, overrides
):
    other = tmp_path / "uniform"
    words = [word for word in overrides(other) if not word.startswith("timesteps")]
    learning = ["timesteps.kind=infonoise", "timesteps.warmup_steps=2", "timesteps.every=2"]
    good("train", "--config", "digits_dit_tiny", *words, *learning)
    good("plot", "--run", other, "--format", "svg")  # at its start, and as it was left
    text = (other / "plots" / "timesteps_learned.svg").read_text()
    assert "at step 20" in text
    assert text.count("at the start = at step 20") == 1  # the weight; the density has moved
    both, out = ["plot", "--run", run, "--run", other], tmp_path / "plots"
    answer = good(*both, "--out", out, "--format", "png", "--format", "pdf")
    assert {Path(line) for line in answer.out.split()} == set(out.iterdir())
    names = {
        f"{name}.{end}" for name in ("loss", "loss_by_t", "timesteps") for end in ("png", "pdf")
    }
    assert {path.name for path in out.iterdir()} == names
    assert all(map(is_a_picture, out.glob("*.png")))
    answer = command(*both)
    assert answer.code == 2 and "give --out" in answer.err
    answer = command("plot", "--run", run, "--run", run, "--out", tmp_path / "twice")
    assert answer.code == 2 and "given twice" in answer.err and not (tmp_path / "twice").exists()


def test_plot_shows_classes_where_samples_were_scored(good, run, samples, tmp_path, is_a_picture):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copytree(samples, copy / "samples")
    good("plot", "--run", copy)
    assert is_a_picture(copy / "plots" / "classes.png")


def test_plot_puts_its_pictures_beside_the_run(good, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    good("plot", "--run", tmp_path / "run")
    assert len(list((tmp_path / "run" / "plots").glob("*.png"))) == 4


def test_summary_tells_what_the_files_hold(good, run, samples, tmp_path, read_json):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copytree(samples, copy / "samples")
    answer = good("summary", "--run", copy, "--started", "0")
    facts = read_json(copy / "summary.json")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (facts["steps"], facts["images"]) == (20, 20 * 16)
    assert facts["loss"] == last["loss"] and facts["timesteps"] == "speed"
    assert facts["parameters"] == read_json(run / "manifest.json")["parameters"]
    score = read_json(samples / "score.json")
    assert facts["class_agreement"] == score["class_agreement"]["agreement"]
    assert facts["frechet_distance"] == score["frechet"]["same_size"]["mean"]
    assert facts["frechet_floor"] == score["frechet"]["floor"]["mean"]
    assert facts["wall_seconds"] > 1e9  # since 1970
    out = answer.out.replace("\n" + " " * 25, " ")  # lines that a terminal's width has broken
    for name, value in facts.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        assert re.search(rf"^{name} +{re.escape(shown)}$", out, re.MULTILINE), name


def test_summary_of_a_run_without_samples(good, run, tmp_path, read_json):
    shutil.copytree(run, tmp_path / "run")
    good("summary", "--run", tmp_path / "run")
    facts = read_json(tmp_path / "run" / "summary.json")
    assert facts["steps"] == 20 and "class_agreement" not in facts and "wall_seconds" not in facts


@pytest.mark.parametrize("end", ["", '{"step": 30, "lo'])
def test_a_killed_runs_metrics_are_summed_up_and_drawn(good, run, tmp_path, read_json, end):
    """A last line that is half-written, and numbers that are not finite, as earlier versions wrote them."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": NaN, "images_per_s": Infinity}\n' + end)
    good("summary", "--run", folder)
    facts = read_json(folder / "summary.json")
    assert facts["loss"] is None and facts["images_per_s"] > 0
    good("plot", "--run", folder)
    assert (folder / "plots" / "loss.png").stat().st_size > 1000


# --------------------------------------------------------------------------------------- export, import


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def exported(good, run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "new folder" / "ema.safetensors"
    good("export", "--run", run, "--out", path)
    return path


def test_export_holds_the_averaged_weights(exported, run):
    assert same(exported, run / NEWEST / "ema.safetensors")


def test_export_holds_the_models_own_weights_if_asked(good, exported, run, tmp_path):
    good("export", "--run", run, "--out", tmp_path / "m.safetensors", "--weights", "model")
    assert same(tmp_path / "m.safetensors", run / NEWEST / "model.safetensors")
    assert not same(tmp_path / "m.safetensors", exported)


def test_diffusers_and_back(good, exported, run, tmp_path, read_json):
    out = tmp_path / "diffusers"
    answer = good("export", "--run", run, "--out", out, "--format", "diffusers")
    assert str(out) in answer.out
    said = " ".join(answer.out.split())
    assert "it decodes latents" in said and "`license`" in said
    assert max(map(len, answer.out.replace(str(out), "OUT").splitlines())) <= 100
    config = read_json(out / "transformer" / "config.json")
    assert config["num_layers"] == 6 and config["sample_size"] == 8
    assert config["num_attention_heads"] * config["attention_head_dim"] == 128
    back = tmp_path / "new folder" / "back.safetensors"
    good("import", "--source", out, "--out", back)
    assert same(back, exported)


def test_the_card_of_an_exported_run(good, command, run, samples, tmp_path, read_json):
    """Its lines draw what `sample` draws from the exported folder; its scores are of these weights or refused."""
    out, words = tmp_path / "diffusers", ["export", "--run", run, "--format", "diffusers"]
    good(*words, "--out", out, "--scores", samples / "score.json")
    card = (out / "README.md").read_text()
    assert "| steps | 20 |" in card and "kind speed" in card and "20 samples, ddim, 5 steps" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace(
        "steps, num = 50", "steps, num = 5"
    )
    noise = []
    from speed_engine.sampling import process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            process.philox,
            "normals",
            lambda *a, f=process.philox.normals: noise.append(f(*a)) or noise[-1],
        )
        shape = ["--num", "4", "--sampler", "ddim", "--steps", "5", "--guidance", "1.5"]
        good("sample", "--weights", out, *shape, "--out", tmp_path / "ours")
        patch.setattr(torch, "randn", lambda *shape, **_: noise[0].reshape(shape).clone())
        patch.chdir(out)
        names = {}
        exec(code, names)
    found = (names["pictures"][:, 0] * 255).round().byte().numpy()
    assert np.abs(found.astype(int) - pictures(tmp_path / "ours")).max() <= 1
    answer = command(
        *words, "--out", tmp_path / "b", "--weights", "model", "--scores", samples / "score.json"
    )
    assert answer.code == 2 and "is of the ema weights of step 20" in answer.err
    assert not (tmp_path / "b").exists()


def test_import_of_a_public_checkpoint(good, exported, tmp_path):
    """The layout of the public files: the EMA beside the model, and the script's arguments."""
    weights = load_file(exported)
    content = {"ema": weights, "model": {key: 0 * value for key, value in weights.items()}}
    torch.save(content | {"args": Namespace(model="DiT-tiny/2")}, tmp_path / "public.pt")
    good("import", "--source", tmp_path / "public.pt", "--out", tmp_path / "ours.safetensors")
    assert same(tmp_path / "ours.safetensors", exported)
