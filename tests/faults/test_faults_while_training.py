"""What breaks while a run trains: what could be saved is saved, and one sentence tells."""

import itertools
import json
import os
import re
import shutil
import sys
import time
from collections import namedtuple
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch

from speed_engine import train
from speed_engine.data import digits
from speed_engine.engines.torch import TorchEngine
from speed_engine.training import checkpoint, metrics, save_time, saving

SHARD = "shard-00000.safetensors"
SMALL = {
    "model.depth": 1,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "train.global_batch": 8,
    "train.steps": 6,
    "checkpoint.every": 2,
    "log.every": 2,
    "engine": "torch",
    "kernels.backend": "reference",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "data"
    digits.write(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capfd, data):
    """run(overrides...) -> (exit code, everything printed) of a tiny run in tmp_path / run."""

    def call(*overrides: str) -> tuple[int, str]:
        small = {"run_dir": tmp_path / "run", "data.kind": "shards", "data.path": data, **SMALL}
        small |= dict(override.split("=", 1) for override in overrides)
        arguments = [f"{key}={value}" for key, value in small.items()]
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", "digits_dit_tiny", *arguments])
        code = train.main()
        answer = capfd.readouterr()
        return code, answer.out + answer.err

    return call


def steps(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-*"))


def test_a_damaged_sample_ends_the_run_after_a_checkpoint_or_is_passed_over(run, tmp_path, data):
    """The first read of a sample that no later step of a short run needs is not reached."""
    damaged = tmp_path / "damaged"
    shutil.copytree(data, damaged)
    for shard in damaged.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        for place in range(0, len(content), 40_000):
            content[place : place + 512] = bytes(512)
        shard.write_bytes(content)
    words = (
        f"data.path={damaged}",
        "train.global_batch=16",
        "train.steps=40",
        "checkpoint.every=50",
        "data.retries=1",  # there are dozens: each would wait 0.7 seconds
    )
    code, output = run(*words)
    assert code == 2 and "Traceback" not in output
    assert output.count("damaged, its CRC32 does not fit") == 1
    (step,) = steps(tmp_path / "run")
    assert f"stopped at step {step}, which is saved" in output
    code, output = run(*words, "data.skip_damaged=true")
    assert code == 0, output
    assert "the next good sample is read in its place (1 skipped)" in output
    assert f"is at step {step}; going on" in output


def test_no_room_for_a_line_of_metrics_ends_nothing(run, tmp_path, monkeypatch):
    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.Journal, "_write", full)
    code, output = run()
    assert code == 0
    assert output.count("WARNING: metrics.jsonl cannot be written") == 1
    assert "No space left" in output and steps(tmp_path / "run") == [4, 6]


def test_a_clock_that_goes_backwards_changes_nothing(run, tmp_path, monkeypatch):
    """By an hour at each look; and the newest checkpoint is that of the last step, whatever the dates of files say."""
    assert run("train.steps=8")[0] == 0
    (tmp_path / "run").rename(tmp_path / "one")
    hours, real = itertools.count(1), time.time

    class Backwards(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(hours=next(hours))

    monkeypatch.setattr(metrics, "datetime", Backwards)
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(hours))
    assert run("train.steps=6")[0] == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    for path in (*newest.rglob("*"), newest):
        os.utime(path, (10**9, 10**9))
    code, output = run("train.steps=8")
    assert code == 0 and "is at step 6; going on" in output, output
    one, other = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("one", "run")
    )
    times = [line["time"] for line in other]
    assert len(times) == 4 and times == sorted(times, reverse=True)
    assert all(line["images_per_s"] > 0 for line in other)
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [line[key] for line in one] == [line[key] for line in other]


def test_a_board_that_fails_ends_nothing(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    code, output = run("log.tensorboard=true")
    assert code == 0 and output.count("WARNING: TensorBoard failed") == 1
    assert "training goes on" in output


def test_a_thread_writes_the_same_bytes(run, tmp_path):
    assert run()[0] == 0
    (tmp_path / "run").rename(tmp_path / "one")
    code, output = run("checkpoint.asynchronous=true")
    assert code == 0, output
    one, other = tmp_path / "one", tmp_path / "run"
    assert steps(one) == steps(other) == [4, 6]
    for step in ("step-00000004", "step-00000006"):
        state = [folder / "checkpoints" / step / "state" / SHARD for folder in (one, other)]
        assert state[0].read_bytes() == state[1].read_bytes()
    assert run("checkpoint.asynchronous=true", "train.steps=7")[0] == 0


def flipping(monkeypatch, call: int) -> None:
    """One bit of one number of the gradient flips in the `call`-th pass forward: a processor that errs once."""
    forward, calls = TorchEngine.forward, itertools.count(1)

    def flip(gradient):
        bits = gradient.clone().view(torch.int32)
        bits.view(-1)[5] ^= 1 << 18
        return bits.view(torch.float32)

    def erring(self, x, time_B, **conditions):
        out = forward(self, x, time_B, **conditions)
        if next(calls) == call:
            out.register_hook(flip)
        return out

    monkeypatch.setattr(TorchEngine, "forward", erring)


@pytest.mark.parametrize("more", [[], ["train.micro_batch=4", "train.exact_sums=true"]])
def test_a_gradient_that_is_not_the_same_again_ends_the_run(run, tmp_path, monkeypatch, more):
    flipping(monkeypatch, 5 * (1 + bool(more)))
    code, output = run("train.replay_every=5", "train.steps=20", *more)
    assert code == 5 and steps(tmp_path / "run") == [2, 4]
    (sentence,) = [line for line in output.splitlines() if line.startswith("error")]
    assert "the gradient of step 4, computed again on process 0" in sentence
    assert " differs first, in " in sentence and "The step was not applied" in sentence
    code, output = run("train.replay_every=5", "train.steps=20", *more)
    assert code == 0 and "is at step 4; going on from there" in output


def test_an_error_that_is_not_looked_for_is_not_seen(run, tmp_path, monkeypatch):
    flipping(monkeypatch, 4)
    assert run("train.replay_every=5")[0] == 0


def test_a_spike_of_the_loss_goes_back(run, tmp_path, monkeypatch):
    """The network's answers are off in one step of a line, once: the run goes back and leaves that line's data out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    forward, calls = TorchEngine.forward, itertools.count(1)

    def off(self, x, time_B, **conditions):
        out = forward(self, x, time_B, **conditions)
        return out + 3.0 if next(calls) == 39 else out

    monkeypatch.setattr(TorchEngine, "forward", off)
    settings = ("train.global_batch=128", "log.every=4", "checkpoint.every=6", "train.steps=44")
    spikes = ("train.spike_sigmas=6", "train.spike_history=16")
    code, output = run(*settings, *spikes, "log.tensorboard=true")
    assert code == 0 and output.count("going back from step 40 to 36 without their data") == 1
    assert "the loss at ln SNR" in output
    last = tmp_path / "run" / "checkpoints" / "step-00000044" / "manifest.json"
    assert json.loads(last.read_text())["left_out"] == [36, 37, 38, 39]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("loss")] == [*range(4, 45, 4)]
    assert shown.Scalars("loss")[9].value == pytest.approx(lines[9]["loss"], rel=1e-6)


def test_looking_changes_nothing(run, tmp_path):
    for name, more in (("one", []), ("other", ["train.replay_every=2"])):
        assert run("train.micro_batch=4", *more)[0] == 0
        (tmp_path / "run").rename(tmp_path / name)
    one, other = (
        (tmp_path / name / "checkpoints" / "step-00000006" / "state" / SHARD).read_bytes()
        for name in ("one", "other")
    )
    assert one == other


def test_a_failure_of_the_thread_ends_the_run(run, tmp_path, monkeypatch):
    write = saving.engines.write

    def full(state, folder):
        if "step-00000004" in str(folder):
            raise OSError(28, "No space left on device")
        write(state, folder)

    monkeypatch.setattr(saving.engines, "write", full)
    code, output = run("checkpoint.asynchronous=true", "train.steps=60", "checkpoint.every=2")
    assert code == 2 and output.count("No space left on device") == 1
    assert steps(tmp_path / "run") == [2]


def test_the_room_is_looked_at_before_a_save(run, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**5))
    code, output = run("checkpoint.on_error=go_on")
    assert code == 2 and "Traceback" not in output  # the last one of a run must be written
    assert output.count("training goes on (checkpoint.on_error=go_on)") == 2
    assert "only 100 kB are free; make room" in output and steps(tmp_path / "run") == []


def test_pinned_checkpoints_stay(run, tmp_path):
    words = ("checkpoint.keep=1", "checkpoint.pin_every=3", "checkpoint.every=1", "train.steps=7")
    assert run(*words)[0] == 0
    assert steps(tmp_path / "run") == [3, 6, 7]


def test_a_folder_that_was_removed_is_told_and_saved_again(run, tmp_path, monkeypatch):
    """At step 4, the next save, or at 3 where the watching thread looks between the two."""
    commit = saving.checkpoint.commit

    def removed(where, step, *rest):
        result = commit(where, step, *rest)
        if step == 2:
            shutil.rmtree(where)
        return result

    monkeypatch.setattr(saving.checkpoint, "commit", removed)
    code, output = run()
    told = re.search(r"was removed while the run used it; step ([34]) is saved there again", output)
    assert code == 2 and told
    assert steps(tmp_path / "run") == [int(told[1])]
    assert run()[0] == 0 and steps(tmp_path / "run") == [4, 6]


def test_settings_that_change_last_bits_at_most_are_told(run, tmp_path):
    assert run()[0] == 0
    code, output = run("train.steps=8", "train.micro_batch=4")
    assert code == 0 and "train.micro_batch: None -> 4" in output
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())["continued"]
    assert told == [{"step": 6, "changed": ["train.micro_batch: None -> 4"]}]


def test_a_refused_run_leaves_nothing(run, tmp_path):
    code, _ = run("checkpoint.resume=must", f"run_dir={tmp_path / 'a' / 'b'}")
    assert code == 2 and not (tmp_path / "a").exists()


def test_a_save_that_outlasts_a_launcher_is_told_at_the_start_and_when_it_happens(
    run, tmp_path, monkeypatch
):
    """Storage that needs a second for each fsync, and a launcher that has no patience for it."""
    sync, clock = save_time.sync, time.monotonic
    late = []

    def slow(path: Path) -> None:
        sync(path)
        late.append(path)

    for module in (save_time, checkpoint):
        monkeypatch.setattr(module, "sync", slow)
    for module in (save_time, saving):
        monkeypatch.setattr(module.time, "monotonic", lambda: clock() + 1000 * len(late))
    monkeypatch.setattr(save_time, "WORTH_A_PROBE", 0)
    monkeypatch.setattr(save_time, "PROBE", 2**10)
    code, output = run("checkpoint.every=3")
    told = re.findall(
        r"WARNING: a checkpoint takes about (\d+) s \((.*?)\), and", " ".join(output.split())
    )
    assert code == 0 and len(told) == 2, output
    took = {"start" if "measured there" in why else why: int(seconds) for seconds, why in told}
    files = (tmp_path / "run" / "checkpoints").glob("step-*3/**/*.safetensors")
    written = sum(path.stat().st_size for path in files)
    assert took["start"] == pytest.approx(written * 1000 / 2**10, rel=0.05)
    assert took["step 3 did"] >= 1000


def test_fast_storage_is_not_probed_for_small_checkpoints_and_not_told_of(run, monkeypatch):
    monkeypatch.setattr(save_time, "rate", lambda folder: pytest.fail("probed"))
    code, output = run()
    assert code == 0 and "a checkpoint takes" not in output
    monkeypatch.setattr(save_time, "rate", lambda folder: 2e9)
    assert save_time.at_start(Path(), 10**10) is None
    assert "50 s" in save_time.at_start(Path(), 10**11)
