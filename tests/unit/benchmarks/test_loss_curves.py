"""The tool that trains values of a setting side by side: the losses of the loop, sound statistics, plain refusals."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.harness import random_latents
from benchmarks.studies import loss_curves, loss_picture
from speed_engine.config import load
from speed_engine.training import loop

SMALL = ["engine=torch", "model.depth=1", "train.global_batch=8", "train.micro_batch=4"]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Runs the command: (exit code, standard output, standard error)."""

    def call(*words: str, preset: str = "digits_dit_tiny") -> tuple[int, str, str]:
        sets = [*SMALL, f"data.path={tmp_path / 'data'}"] if preset == "digits_dit_tiny" else SMALL
        arguments = ["--preset", preset, "--out", str(tmp_path / "out"), *words]
        for one in sets:
            arguments += ["--set", one]
        monkeypatch.setattr(sys, "argv", ["loss_curves", *arguments])
        code = loss_curves.main()
        answer = capfd.readouterr()
        return code, answer.out, answer.err

    return call


def test_both_runs_are_the_runs_of_the_training_loop(command, tmp_path):
    """Block by block, in turns, and yet the very losses that `train` logs for each value alone."""
    what = ("--compare", "optim.lr=2e-3,2e-2", "--steps", "7", "--block", "3", "--name", "both")
    code, out, _ = command(*what, "--set", "optim.warmup_steps=0")
    assert code == 0
    report = json.loads((tmp_path / "out" / "both.json").read_text())
    assert report["values"] == ["2e-3", "2e-2"] and str(tmp_path) not in json.dumps(report)
    assert (tmp_path / "out" / "both.png").read_bytes()[:4] == b"\x89PNG"
    assert out.count("\n") == 4 and "| 2e-2 | " in out
    for value in report["values"]:
        overrides = [*SMALL, f"data.path={tmp_path / 'data'}", f"optim.lr={value}", "log.every=1"]
        overrides += ["optim.warmup_steps=0", "train.steps=7", f"run_dir={tmp_path / value}"]
        assert loop.train(load("digits_dit_tiny", overrides)) == 0
        lines = (tmp_path / value / "metrics.jsonl").read_text().splitlines()
        wanted = [json.loads(line)["loss"] for line in lines]
        assert report["losses"][value] == pytest.approx(wanted, rel=1e-6)
        assert len(report["seconds_per_step_of_blocks"][value]) == 3
    first, second = report["losses"].values()
    assert first[0] == second[0]  # nothing has been learned yet
    assert abs(first[-1] - second[-1]) > 1e-3


def test_random_latents_need_no_files(command, tmp_path):
    small = [
        "model.hidden_size=48",
        "data=benchmarks.harness.random_latents",
        "data.num_samples=16",
    ]
    words = [word for one in small for word in ("--set", one)]
    what = ("--compare", "kernels.backend=auto,reference", "--steps", "2", "--block", "1")
    code, _, err = command(*what, *words, preset="imagenet256_dit_s2")
    assert code == 0, err
    report = json.loads(
        (tmp_path / "out" / "loss_kernels.backend_imagenet256_dit_s2.json").read_text()
    )
    first, second = report["losses"].values()
    assert first == pytest.approx(second, rel=1e-4)


def test_fp8_products_learn_beside_native_ones(command, tmp_path):
    """e4m3 has three bits of mantissa: the losses differ, but by less than the network learns."""
    what = ("--compare", "model.products=native,fp8_tensor,fp8_row", "--steps", "20")
    code, _, err = command(*what, "--block", "20", "--set", "optim.warmup_steps=0", "--name", "fp8")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "fp8.json").read_text())
    native, *others = report["losses"].values()
    learned = statistics.fmean(native[:2]) - statistics.fmean(native[-2:])
    assert learned > 0.1
    for losses in others:
        difference = statistics.fmean(abs(a - b) for a, b in zip(losses, native, strict=True))
        assert 0 < difference < 0.1 * learned


def test_random_latents_are_a_table():
    config = random_latents.Config(num_samples=64, num_classes=5, size=16)
    one, again = random_latents.build(config), random_latents.build(config)
    stored, told = one.read([3, 60, 3])
    x = one.decode(stored)
    assert x.shape == (3, 4, 16, 16) and x.dtype == torch.float32 and len(one) == 64
    assert torch.equal(x, again.decode(again.read([3, 60, 3])[0])) and torch.equal(x[0], x[2])
    assert told["label"].max() < 5 and x.std().item() == pytest.approx(1, rel=0.1)
    assert torch.equal(one.decode(one.read([3, 60], [True, False])[0])[0], x[0].flip(-1))
    assert torch.equal(
        one.decode(one.read([3])[0]), x[:1]
    )  # flipping changed nothing that is stored
    with pytest.raises(ValueError, match="multiple of 8"):
        random_latents.build(random_latents.Config(size=12))


# ------------------------------------------------------------------ statistics


def contender(value: str, losses: list[float], seconds: list[float], skipped: int = 0):
    return SimpleNamespace(value=value, losses=losses, seconds=seconds, skipped=skipped)


def test_summary_pairs_steps_and_blocks():
    noise = random.Random(0)
    base = [1.0 + noise.gauss(0, 0.3) for _ in range(200)]
    shifted = [loss + 0.01 for loss in base]
    slow, fast = [9.0, 2.0, 20.0, 2.0], [1.0, 1.0, 10.0, 1.0]
    both = [contender("a", base, slow), contender("b", shifted, fast, skipped=2)]
    a, b = loss_curves.summarise(both)  # pyright: ignore[reportArgumentType]
    assert a.final_loss == pytest.approx(statistics.fmean(base[-20:]))
    assert (a.difference, a.time_ratio, a.seconds) == (0.0, 1.0, 2.0)
    assert b.difference == pytest.approx(0.01) and b.standard_error < 1e-12 < a.final_loss
    # The first block compiles; the disturbed third one disturbed both.
    assert (b.seconds, b.time_ratio, b.skipped) == (1.0, 2.0, 2)
    table = loss_curves.as_table("model.products", [a, b], 200)
    assert "last 20 steps" in table and "+1.00e-02" in table


def test_standard_error_knows_of_memory():
    """Of differences that remember the last steps the plain formula would claim a third of the error."""
    noise = random.Random(1)
    errors, means = [], []
    for _ in range(300):
        state, series = 0.0, []
        for _ in range(400):
            state = 0.8 * state + noise.gauss(0, 1)
            series.append(state)
        errors.append(loss_curves.standard_error(series))
        means.append(statistics.fmean(series))
    true = statistics.stdev(means)
    assert statistics.median(errors) == pytest.approx(true, rel=0.25)
    assert math.isnan(loss_curves.standard_error([1.0]))
    assert loss_curves.standard_error([0.0, 2.0]) == pytest.approx(1.0)
    assert loss_curves.standard_error([1e9, *[1.0] * 20]) == 0.0  # the odd one out is the oldest


def test_a_picture_of_a_run_that_diverged(tmp_path):
    curve = [1.0, 0.9, math.nan, 0.8, 0.7, math.inf]
    assert np.isnan(loss_picture.smoothed(np.array(curve), 1)).tolist() == [
        False, False, True, False, False, True,
    ]  # fmt: skip
    curves = {"a": [1.0] * 6, "b": curve}
    path = loss_picture.draw("optim.lr", curves, "run", tmp_path / "curves.png")
    assert path.stat().st_size > 10_000


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine.precision", "write it as section.key=VALUE,VALUE"),
        ("engine.precision=fp32", "write it as section.key=VALUE,VALUE"),
        ("engine.precision=fp32,fp32", "with different values"),
        ("engine.precision=fp32,", "write it as"),
        ("seed=1,2", "would not see the same batches"),
        ("timesteps.kind=speed,uniform", "would not see the same batches"),
        ("engine.device=cpu,cuda", "not engine.device"),
        ("engine.precison=fp32,bf16", "did you mean 'precision'"),
        ("engine.precision=fp32,int4", "engine.precision"),
    ],
)
def test_mistakes_are_told_in_one_sentence(command, text, words):
    code, _, err = command("--compare", text)
    assert code == 2 and words in err and "Traceback" not in err


def test_methods_that_learn_are_refused(command):
    what = ("--compare", "engine.precision=fp32,bf16", "--set", "timesteps=infonoise")
    code, _, err = command(*what)
    assert code == 2 and "timesteps.kind=infonoise changes with the losses" in err
