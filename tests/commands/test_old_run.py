"""A run folder of the first version (manifest and weights without a format number) goes on and is read.

tests/golden/run_format_1 holds what that version left behind, made on a CPU by

    train --config digits_dit_tiny engine=torch model.size=tiny/2 model.hidden_size=16 model.depth=1 model.num_heads=1
        checkpoint.every=2 checkpoint.keep=1 log.every=1 train.global_batch=16 optim.warmup_steps=2 optim.ema_decay=0.5

with train.steps=4 (`run`) and, never interrupted, train.steps=6 (`whole_metrics.jsonl`), and by
`sample --run run --num 4 --steps 5 --sampler ddim` (`samples.npz`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

OLD = Path(__file__).resolve().parents[1] / "golden" / "run_format_1"
WORDS = [
    "train", "--config", "digits_dit_tiny", "engine=torch", "model.size=tiny/2", "model.hidden_size=16",
    "model.depth=1", "model.num_heads=1", "checkpoint.every=2", "checkpoint.keep=1", "log.every=1",
    "train.global_batch=16", "optim.warmup_steps=2", "optim.ema_decay=0.5",
]  # fmt: skip


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old run folder, on a machine without a GPU as its own was."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(OLD / "run", tmp_path / "run")
    return tmp_path / "run"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_goes_on_as_if_it_had_never_stopped(good, data, old):
    answer = good(
        *WORDS, f"run_dir={old}", f"data.path={data}", "train.steps=6", "checkpoint.resume=must"
    )
    assert "WARNING" not in answer.out + answer.err
    found, wanted = lines_of(old / "metrics.jsonl"), lines_of(OLD / "whole_metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for now, before in zip(found, wanted, strict=True):
        for key in ("loss", "mse", "vb", "lr"):
            assert now[key] == pytest.approx(before[key], rel=1e-6, abs=1e-7), (now["step"], key)
    assert (old / "checkpoints" / "step-00000006" / "ema.safetensors").exists()


def test_another_setting_is_noticed(command, data, old):
    words = [*WORDS, f"run_dir={old}", f"data.path={data}", "train.steps=6"]
    answer = command(*words, "conditions.label.dropout=0.2")
    assert answer.code == 2 and "conditions.label.dropout: 0.1 -> 0.2" in answer.err


def test_its_samples_are_the_old_ones(good, old, tmp_path):
    words = ["--num", "4", "--steps", "5", "--sampler", "ddim", "--device", "cpu"]
    good("sample", "--run", old, "--out", tmp_path / "samples", *words)
    found, wanted = np.load(tmp_path / "samples" / "samples.npz"), np.load(OLD / "samples.npz")
    assert found["labels"].tolist() == wanted["labels"].tolist() == [0, 1, 2, 3]
    difference = np.abs(found["arr_0"].astype(int) - wanted["arr_0"].astype(int))
    assert difference.max() <= 1  # another CPU may round the last bit otherwise


def test_it_is_summed_up_and_drawn(good, old, tmp_path):
    good("summary", "--run", old)
    facts = json.loads((old / "summary.json").read_text(encoding="utf-8"))
    assert facts["steps"] == 4 and facts["parameters"] == 10168
    good("plot", "--run", old, "--out", tmp_path / "plots")
    assert {"loss.png", "loss_by_t.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}


def test_its_weights_come_out_in_todays_format(good, old, tmp_path):
    from speed_engine.weights import file as weights_file

    good("export", "--run", old, "--out", tmp_path / "m.safetensors")
    stored = load_file(old / "checkpoints" / "step-00000004" / "ema.safetensors")
    model, notes = weights_file.load(tmp_path / "m.safetensors")
    assert (notes["step"], notes["weights"], notes["run"]["schedule"]["kind"]) == (
        4,
        "ema",
        "linear",
    )
    assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())
    told = model.facts.conditions["label"]
    assert (told.num_values, told.null, model.facts.space.kind) == (10, True, "pixels")
    metadata = weights_file.read_safetensors(tmp_path / "m.safetensors")[1]
    assert json.loads(metadata["speed_engine"])["format"] == 2
    good("export", "--run", old, "--out", tmp_path / "folder", "--format", "diffusers")
    back = tmp_path / "back.safetensors"
    good("import", "--source", tmp_path / "folder", "--out", back)
    assert all(torch.equal(stored[key], value) for key, value in load_file(back).items())
