"""Super-resolution as a user types it: pairs are encoded, a network is told the low picture, a folder is sharpened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from speed_engine.data.low_resolution import reduced
from speed_engine.training import metrics_file

NUM = 8
ENCODE = ["encode", "--size", "8", "--channels", "1", "--images"]
TINY = ["model.size=tiny/2", "model.hidden_size=16", "model.depth=2", "model.num_heads=2"]
RUN = ["engine=torch", "train.global_batch=4", "checkpoint.every=2", "log.every=1"]
RUN += ["optim.lr=3e-2", "optim.warmup_steps=1", "optim.ema_decay=0.1"]  # pictures must show
TOLD = ["conditions.image.noise=0.5", "conditions.image.dropout=0.2", "train.flip=true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, good: Any) -> Path:
    """Pictures of two classes, the set that is made of them, and their small ones in a folder."""
    folder = tmp_path_factory.mktemp("superres")
    random = np.random.default_rng(1)
    (folder / "low").mkdir()
    for number in range(NUM):
        pixels = random.integers(0, 256, (8, 8)).astype(np.uint8)
        inner = folder / "pictures" / "ab"[number % 2]
        inner.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(inner / f"{number}.png")
        Image.fromarray(reduced(pixels[None], 4)[0]).save(folder / "low" / f"small {number}.png")
    said = good(
        *ENCODE, folder / "pictures", "--low-resolution", 4, "--out", folder / "set", "--verify"
    )
    assert "beside them 1 x 4 x 4 pixels" in " ".join(said.err.split())
    return folder


def train(good: Any, place: Path, name: str, *words: str) -> Path:
    given = {word.partition("=")[0] for word in words}
    told = [word for word in TOLD if not word.startswith(tuple(given))]
    every = [f"data.path={place / 'set'}", f"run_dir={place / name}", *RUN, *told]
    good("train", "--config", "own_pixels", *every, *words)
    return place / name


@pytest.fixture(scope="module")
def run(place: Path, good: Any) -> Path:
    """Four steps, of which two are a continuation."""
    for steps in ("2", "4"):
        train(good, place, "run", *TINY, f"train.steps={steps}")
    return place / "run"


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_file.read(run / "metrics.jsonl") if "loss" in line]


def test_a_continued_run_has_the_same_bits(run: Path, place: Path, good: Any) -> None:
    whole = train(good, place, "whole", *TINY, "train.steps=4")
    files = [sorted((each / "checkpoints").glob("*4/*.safetensors")) for each in (run, whole)]
    assert files[0] and [f.name for f in files[0]] == [f.name for f in files[1]]
    for one, other in zip(*files, strict=True):
        tensors = [load_file(path) for path in (one, other)]
        assert all((each == tensors[1][name]).all() for name, each in tensors[0].items()), one


def test_the_reference_and_the_fused_kernels_agree(run: Path, place: Path, good: Any) -> None:
    plain = train(good, place, "plain", *TINY, "train.steps=4", "kernels.backend=reference")
    assert losses(plain) == pytest.approx(losses(run), rel=1e-5)
    parts = train(good, place, "parts", *TINY, "train.steps=4", "train.micro_batch=2")
    assert losses(parts) == pytest.approx(losses(run), rel=1e-5)
    other = train(good, place, "other", *TINY, "train.steps=4", "conditions.image.noise=0")
    assert losses(other) != pytest.approx(losses(run), rel=1e-3), "the noise is at work"


DRAW = ["--steps", "2", "--sampler", "ddim", "--weights", "model"]


def pixels(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


def test_a_folder_is_sharpened_and_names_are_kept(
    run: Path, place: Path, good: Any, read_json: Any, tmp_path: Path
) -> None:
    words = ["sample", "--run", run, "--low-resolution", place / "low", *DRAW]
    assert "8 samples in" in good(*words, "--out", tmp_path / "all").out
    files = sorted(path.name for path in (tmp_path / "all" / "images").iterdir())
    assert files == [f"small {number}.png" for number in range(NUM)]
    found = pixels(tmp_path / "all")
    assert found.shape == (NUM, 8, 8, 1)
    (tmp_path / "all" / "images" / "small 3.png").unlink()  # as after an interruption
    (tmp_path / "all" / "samples.npz").unlink()
    good(*words, "--out", tmp_path / "all")
    assert np.array_equal(pixels(tmp_path / "all"), found)
    shutil.copytree(place / "low", tmp_path / "turned")
    for path in (tmp_path / "turned").iterdir():
        Image.fromarray(np.asarray(Image.open(path))[:, ::-1]).save(path)
    words[4] = tmp_path / "turned"
    good(*words, "--num", 4, "--out", tmp_path / "other")
    assert not np.array_equal(pixels(tmp_path / "other"), found[:4]), "the picture is told"
    # none of the classes, which the folder does not tell
    told = read_json(tmp_path / "all" / "recipe.json")
    assert told["names"] == [f"small {number}" for number in range(NUM)]
    good(
        "score", "--samples", tmp_path / "all", "--reference", place / "set", "--features", "pixels"
    )


def test_a_set_tells_its_classes_too(run: Path, place: Path, good: Any, tmp_path: Path) -> None:
    words = ["sample", "--run", run, *DRAW, "--low-resolution"]
    good(*words, place / "set", "--out", tmp_path / "set")
    labels = np.load(tmp_path / "set" / "samples.npz")["labels"]
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert (tmp_path / "set" / "images" / "000000.png").exists()
    # the same pictures by hand: of class a the even ones
    (tmp_path / "a").mkdir()
    for number in range(0, NUM, 2):
        shutil.copy(place / "low" / f"small {number}.png", tmp_path / "a")
    good(*words, tmp_path / "a", "--label", "a", "--out", tmp_path / "by_hand")
    assert np.array_equal(pixels(tmp_path / "by_hand"), pixels(tmp_path / "set")[:4])


def test_weights_alone_sharpen_and_know_their_noise(
    run: Path, place: Path, good: Any, command: Any, tmp_path: Path
) -> None:
    good("export", "--run", run, "--weights", "model", "--out", tmp_path / "it.safetensors")
    words = ["--steps", "2", "--sampler", "ddim", "--low-resolution", place / "low"]
    words += ["--guidance", "2", "--low-resolution-noise"]
    good("sample", "--weights", tmp_path / "it.safetensors", *words, "0.5", "--out", tmp_path / "a")
    good("sample", "--run", run, "--weights", "model", *words, "0.5", "--out", tmp_path / "b")
    assert np.array_equal(pixels(tmp_path / "a"), pixels(tmp_path / "b"))
    good("sample", "--run", run, "--weights", "model", *words, "0", "--out", tmp_path / "c")
    assert not np.array_equal(pixels(tmp_path / "c"), pixels(tmp_path / "b"))
    answer = command("sample", "--run", run, *words, "0.6", "--out", tmp_path / "d")
    assert answer.code == 2 and "the network knows levels from 0 to 0.5" in answer.err
    answer = command("export", "--run", run, "--format", "diffusers", "--out", tmp_path / "folder")
    assert answer.code == 2 and "image" in answer.err and not (tmp_path / "folder").exists()


def test_a_u_net_is_told_the_picture(place: Path, good: Any, tmp_path: Path) -> None:
    small = ["model={kind: unet, size: tiny, width: 8, num_blocks: 1}", "train.steps=2"]
    looks = ["validation.every=2", "validation.samples=3", "sample.every=2", "sample.num=5"]
    unet = train(good, place, "unet", *small, *looks, "sample.steps=2")
    line = metrics_file.read(unet / "metrics.jsonl")[-1]
    assert line["validation_loss"] > 0 and (unet / "grids" / "step-00000002.png").exists()
    assert (
        "condition       image: image uint8 [1, 4, 4], dropped at 0.2"
        in good(
            "plan", "--config", "own_pixels", f"data.path={place / 'set'}", *RUN, *TOLD, *small
        ).out
    )
    words = ["--run", unet, "--low-resolution", place / "low", "--num", "2", *DRAW]
    good("sample", *words, "--out", tmp_path / "drawn")
    one = np.asarray(Image.open(place / "low" / "small 0.png"))[None]
    np.save(tmp_path / "one.npy", one)
    words = ["--run", unet, "--num", "1", "--condition", f"image={tmp_path / 'one.npy'}", *DRAW]
    good("sample", *words, "--label", "a", "--out", tmp_path / "by_file")


def test_mistakes_of_sample(
    run: Path, place: Path, command: Any, good: Any, tmp_path: Path
) -> None:
    (tmp_path / "wide").mkdir()
    Image.new("L", (8, 4)).save(tmp_path / "wide" / "w.png")
    good(*ENCODE, place / "pictures", "--out", tmp_path / "plain")
    np.save(tmp_path / "large.npy", np.zeros((1, 8, 8), "u1"))
    low = ["--low-resolution", place / "low"]
    for words, why in (
        ([*low, "--num", "9"], "--num 9, and"),
        (["--low-resolution", tmp_path / "wide"], "w.png: has 8 x 4 pixels instead of 4 x 4"),
        (["--low-resolution", tmp_path / "none"], "is not a folder"),
        (["--low-resolution", tmp_path / "plain"], "holds no pictures under image"),
        (["--low-resolution-noise", "0.1"], "belongs to --low-resolution"),
        (["--condition", f"image={tmp_path / 'large.npy'}"], "uint8 [1, 8, 8], and the network is"),
    ):
        answer = command("sample", "--run", run, *DRAW, *words, "--out", tmp_path / "out")
        assert answer.code == 2 and why in answer.err, answer.err
        assert len(answer.err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_mistakes_of_encode_and_train(place: Path, command: Any, tmp_path: Path) -> None:
    images = [*ENCODE, place / "pictures", "--out", tmp_path / "out", "--low-resolution"]
    digits = ["encode", "--images", "digits", "--out", tmp_path / "out", "--low-resolution"]
    given = ["train", "--config", "own_pixels", f"data.path={place / 'set'}", *TINY]
    for words, why in (
        ([*images, "3"], "--low-resolution 3 does not divide the size 8"),
        ([*images, "8"], "does not divide the size 8; give a smaller number"),
        ([*digits, "5"], "--low-resolution 5 does not divide the size 8"),
        (["encode", "--arrays", "x.npz", "--low-resolution", "4"], "belongs to --images"),
        ([*given, "conditions.image={noise: 1}"], "noise: Input should be less than 1"),
        ([*given, "conditions.image=null", "conditions.vector={}"], "hold no such condition"),
    ):
        folder = [f"run_dir={tmp_path / 'run'}"] if words[0] == "train" else []
        answer = command(*words, *folder)
        assert answer.code == 2 and why in answer.err, answer.err
        assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_told_no_picture(
    place: Path, good: Any, command: Any, tmp_path: Path
) -> None:
    plain = train(good, place, "untold", *TINY, "train.steps=2", "conditions.image=null")
    words = ["sample", "--run", plain, *DRAW, "--out", tmp_path / "out"]
    answer = command(*words, "--low-resolution", place / "low")
    assert answer.code == 2 and "this one is told label" in answer.err
    good(*words, "--num", "2")


def test_latents_are_sharpened_through_their_vae(
    place: Path, good: Any, command: Any, tmp_path: Path
) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    two |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (4, 4)}
    one = {"in_channels": 1, "out_channels": 1, "norm_num_groups": 2, "sample_size": 8}
    model: Any = AutoencoderKL(**two, **one)
    model.save_pretrained(tmp_path / "vae")
    through = ["--mode", "latents", "--vae", tmp_path / "vae", "--flip", "--scale", "auto"]
    images = [*ENCODE, place / "pictures", *through, "--out", tmp_path / "set"]
    answer = command(*images, "--low-resolution", "1")
    assert answer.code == 2 and "--low-resolution 1 is no multiple of 2" in answer.err
    good(*images, "--low-resolution", "4")
    data = [f"data.path={tmp_path / 'set'}", f"run_dir={tmp_path / 'run'}", *TINY, *RUN, *TOLD]
    good("train", "--config", "own_latents", *data, "train.steps=2")
    words = ["sample", "--run", tmp_path / "run", *DRAW, "--low-resolution"]
    answer = command(*words, place / "low", "--out", tmp_path / "none")
    assert answer.code == 2 and "give --vae" in answer.err
    words += [place / "low", "--vae", tmp_path / "vae", "--out", tmp_path / "drawn"]
    good(*words, "--low-resolution-noise", "0.25")
    assert pixels(tmp_path / "drawn").shape == (NUM, 8, 8, 1)
    assert (tmp_path / "drawn" / "images" / "small 7.png").exists()
