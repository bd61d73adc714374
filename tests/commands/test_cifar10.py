"""EDM and FDM on CIFAR-10 from an archive of its format to pictures, shrunken: encode, train, sample, resume."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

SMALL = [
    "engine.kind=torch",
    "model.width=8",
    "model.multipliers=[1, 1]",
    "schedule.num_cells=512",
    "model.num_blocks=1",
    "model.attention_at=[16]",
    "train.global_batch=8",
    "train.micro_batch=4",
    "optim.warmup_images=160",
    "optim.ema_half_life_images=16",
    "log.every=1",
    "checkpoint.every=1",
    "validation={every: 2, samples: 2, rows: 2}",
]
SPEED = "timesteps={kind: combine, parts: [edm, speed_u]}"


@pytest.fixture(scope="module")
def cifar(good, tmp_path_factory) -> Path:
    """The shards of an archive of ten noisy pictures, as CIFAR's authors pack them."""
    folder, random = tmp_path_factory.mktemp("cifar"), np.random.default_rng(3)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:

        def add(name: str, content: object) -> None:
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for number in range(5):
            pixels = random.integers(0, 256, (2, 3072), dtype=np.uint8)
            labels = [2 * number, 2 * number + 1]
            batch = {b"data": pixels, b"labels": labels, b"filenames": [b"a.png", b"b.png"]}
            add(f"data_batch_{number + 1}", batch)
        add("batches.meta", {"label_names": [f"name{i}" for i in range(10)]})
    archive_path = folder / "cifar-10-python.tar.gz"
    good("encode", "--images", archive_path, "--size", "32", "--out", folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def train(good, cifar):
    """train(preset, run folder, overrides...)"""

    def command(preset: str, run: Path, *words: str):
        settings = [*SMALL, f"data.path={cifar}", f"run_dir={run}", *words]
        return good("train", "--config", preset, *settings)

    return command


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("cifar10_edm", []),
        ("cifar10_fdm", [SPEED]),
    ],
)
def test_from_the_archive_to_pictures(train, good, tmp_path, preset, words):
    train(preset, tmp_path / "run", "train.steps=2", *words)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    told = manifest["data"]["conditions"]
    assert told["augment"]["arrays"]["augment"]["shape"] == [9]
    assert told["label"]["names"][7] == "name7"
    assert manifest["config"]["optim"]["warmup_steps"] == 20  # 160 images of 8 a step
    assert manifest["config"]["optim"]["ema_half_life"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    recipe = ["--num", "2", "--sampler", "heun", "--steps", "3", "--no-clip"]
    recipe += ["--guidance", "1.5", "--guidance-power", "4", "--label", "name7"]
    good("sample", "--run", tmp_path / "run", "--out", tmp_path / "drawn", *recipe)
    told = json.loads((tmp_path / "drawn" / "recipe.json").read_text())
    assert told["clip_x0"] is False and told["guidance_power"] == 4
    with np.load(tmp_path / "drawn" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 32, 32, 3)
        assert arrays["labels"].tolist() == [7, 7]


def test_a_resumed_run_is_the_uninterrupted_one(train, tmp_path):
    """With dropout, augmentation, FDM's growing ceiling, rate and average in warm-up, two micro-batches."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train("cifar10_fdm", whole, SPEED, "train.steps=2")
    train("cifar10_fdm", parted, SPEED, "train.steps=1")
    train("cifar10_fdm", parted, SPEED, "train.steps=2")
    for name in ("model", "ema"):
        files = [
            next((run / "checkpoints" / "step-00000002").rglob(f"{name}*.safetensors"), None)
            for run in (whole, parted)
        ]
        assert files[0] is not None and files[1] is not None
        one, other = (load_file(file) for file in files)
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    # and the augmentation was at work: without it the same steps come to something else
    shutil.rmtree(parted)
    train("cifar10_fdm", parted, SPEED, "train.steps=2", "conditions.augment.probability=0")
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
        for run in (whole, parted)
    ]
    assert losses[0] != losses[1]


def test_what_cannot_be_is_said(command, cifar, tmp_path, good):
    words = [*SMALL, f"data.path={cifar}", f"run_dir={tmp_path / 'run'}", "train.steps=1"]
    no_labels = ["conditions.label=null"]
    good("train", "--config", "cifar10_edm", *words, *no_labels, "timesteps=speed")
    out = ["--out", tmp_path / "drawn", "--num", "1", "--sampler", "heun", "--steps", "2"]
    answer = command("sample", "--run", tmp_path / "run", *out, "--guidance", "2")
    assert answer.code == 2 and "guidance needs a conditional model" in answer.err
    answer = command("sample", "--run", tmp_path / "run", *out, "--condition", "augment=0,0")
    assert answer.code == 2 and "leave augment=0,0 out" in answer.err
    small = [f"data.path={cifar}", "validation.every=0"]
    dit = ["model={kind: dit, size: tiny/2}", *small, *no_labels]
    answer = command("plan", "--config", "cifar10_edm", *dit)
    assert answer.code == 2 and "conditions.augment=null" in answer.err
