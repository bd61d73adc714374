"""MDT as a user trains it: resumed with masks on, by adaptive methods, and sampled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

MODEL = "model={kind: mdt, size: tiny/2, hidden_size: 32, depth: 4, num_heads: 2}"


@pytest.fixture
def train(good, overrides):
    """train(run folder, overrides...): a tiny run of an MDT."""

    def command(run: Path, *changes: str):
        changed = {word.split("=")[0] for word in changes}
        changed |= {"timesteps.k"} if "timesteps" in changed else set()
        words = [word for word in overrides(run) if word.split("=")[0] not in changed]
        return good("train", "--config", "digits_dit_tiny", MODEL, *words, *changes)

    return command


def test_a_resumed_run_is_the_uninterrupted_one(train, good, tmp_path):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    every = ["checkpoint.every=2", "log.every=1"]
    train(whole, *every, "train.steps=4")
    train(parted, *every, "train.steps=2")
    train(parted, *every, "train.steps=4", "train.micro_batch=16")
    for name in ("model", "ema"):
        one, other = (
            load_file(next((run / "checkpoints" / "step-00000004").rglob(f"{name}*.safetensors")))
            for run in (whole, parted)
        )
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    steps = ["--num", "2", "--sampler", "ddim", "--steps", "2", "--guidance", "2"]
    good("sample", "--run", parted, "--out", tmp_path / "drawn", *steps)
    assert (tmp_path / "drawn" / "grid.png").exists()


@pytest.mark.parametrize("method", ["infonoise", "adaptive", "speed_u"])
def test_it_trains_with_every_sort_of_time_step_method(train, tmp_path, method):
    settings = {"infonoise": ["objective=v"], "adaptive": [], "speed_u": []}[method]
    train(tmp_path, "train.steps=2", f"timesteps={method}", *settings)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_a_dit_with_a_route_is_trained_and_sampled_without_it(good, overrides, tmp_path):
    model = (
        "model={kind: dit, size: tiny/2, hidden_size: 32, depth: 4, num_heads: 2, route: [1, 3]}"
    )
    words = [
        word
        for word in overrides(tmp_path / "run")
        if not word.startswith(("train.steps", "log.every"))
    ]
    good("train", "--config", "digits_dit_tiny", model, *words, "train.steps=2", "log.every=1")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    steps = ["--num", "2", "--sampler", "ddim", "--steps", "2"]
    good("sample", "--run", tmp_path / "run", "--out", tmp_path / "drawn", *steps)
    assert (tmp_path / "drawn" / "grid.png").exists()
