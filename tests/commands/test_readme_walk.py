"""README's walk from a folder of pictures to weights, each command as it stands there, only smaller."""

import logging
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from speed_engine.data import autoencoder

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
SMALL = {
    "encode": ["--shard-size", "8"],
    "sample": ["--num", "4", "--steps", "3", "--batch-size", "4"],
}
TRAINING = {
    "engine": "torch",
    "model.size": "tiny/2",
    "model.depth": 1,
    "train.global_batch": 4,
    "optim.lr": 1e-2,  # a network of a few steps that has left its zeros
    "optim.warmup_steps": 1,
    "optim.ema_decay": 0.5,
    "checkpoint.every": 2,
    "log.every": 2,
}


def walk(title: str) -> list[list[str]]:
    """The commands of README's section, as words: `train ...` for what a launcher starts."""
    section = README.split(f"### {title}\n")[1].split("\n### ")[0]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).splitlines()
    return [
        shlex.split(line.replace("deepspeed speed_engine/train.py", "python -m speed_engine train"))
        for line in lines
        if line.strip()
    ]


def smaller(words: list[str], steps: int, **changes: Any) -> list[str]:
    """The words behind `python -m speed_engine`, with a tiny network and `steps` steps."""
    assert words[:3] == ["python", "-m", "speed_engine"]
    command, rest = words[3], [word for word in words[4:] if not word.startswith("train.steps=")]
    if command in ("train", "plan"):
        every = {**TRAINING, "train.steps": steps, **changes}
        return [command, *rest, *(f"{key}={value}" for key, value in every.items())]
    return [command, *rest, *SMALL.get(command, [])]


def pictures(folder: Path, side: int) -> None:
    """Two pictures in each of five classes, brighter from class to class."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("ants", "bees", "cats", "dogs", "eels")):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            array = rng.integers(0, 100, (side, side, 3)) + 30 * number
            Image.fromarray(array.astype(np.uint8)).save(folder / name / f"{i}.png")


def test_own_pictures(good, tmp_path, monkeypatch, read_json):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 40)
    commands = walk("Your own pictures")
    assert [words[3] for words in commands] == [
        "encode", "plan", "train", "train", "sample", "score", "plot", "export", "sample"
    ]  # fmt: skip
    trained = 0
    for words in commands:
        trained += words[3] == "train"
        answer = good(*smaller(words, 2 * max(trained, 1)))
        if words[3] == "train":
            start = "training starts at step 0" if trained == 1 else "is at step 2; going on"
            assert start in answer.err and f"step {2 * trained} is saved" in answer.err
    assert read_json(tmp_path / "data" / "mine" / "index.json")["class_names"][-1] == "eels"
    assert (tmp_path / "mine.safetensors").stat().st_size > 0
    drawn = sorted((tmp_path / "runs" / "mine" / "samples").rglob("*.png"))
    again = sorted((tmp_path / "from_the_file").rglob("*.png"))
    assert len(drawn) == len(again) >= 4
    assert list((tmp_path / "runs" / "mine" / "plots").glob("*.png"))
    assert (tmp_path / "runs" / "mine" / "samples" / "score.json").exists()


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A random autoencoder of diffusers with ImageNet's factor of 8 and 4 channels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    model: Any = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
    )
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_latents(good, tmp_path, monkeypatch, vae, read_json):
    """Also: what diffusers says is beside what the command makes, not on the terminal."""
    monkeypatch.chdir(tmp_path)

    def loaded(*words: Any, real: Any = autoencoder._loaded) -> Any:
        logging.getLogger("diffusers.models").warning("a remark of diffusers")
        return real(*words)

    monkeypatch.setattr(autoencoder, "_loaded", loaded)
    pictures(tmp_path / "ILSVRC" / "train", 64)
    # A random autoencoder's latents are of any size, and those of 64 pixels are 8 wide.
    changes = {"data.check_scale": "false", "data.expect.shape": "[4,8,8]"}
    changes["validation.every"] = "0"  # of ten pictures no thousand can be held out
    commands = walk("ImageNet, or any pictures as latents")
    assert [words[3] for words in commands] == ["encode", "train", "sample"]
    for words in commands:
        words = [str(vae) if word.startswith("stabilityai/") else word for word in words]
        words = ["64" if word == "256" else word for word in words]
        changed = {**changes, "engine.precision": "fp32"}
        answer = good(*smaller(words, 2, **(changed if words[3] == "train" else {})))
        assert "a remark of diffusers" not in answer.out + answer.err
        if words[3] == "train":  # what it says comes next can be typed
            assert "sample --run runs/xl2 --vae vae --out runs/xl2/samples" in answer.err
    index = read_json(tmp_path / "data" / "imagenet256" / "index.json")
    assert index["shape"] == [4, 8, 8] and index["flipped"]
    for made in ("data/imagenet256", "runs/xl2/samples"):
        assert "a remark of diffusers" in (tmp_path / made / "libraries.log").read_text()
    assert len(list((tmp_path / "runs" / "xl2" / "samples").rglob("*.png"))) >= 4
