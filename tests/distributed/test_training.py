"""The real training program in real processes: resume, world sizes, stages, signals, mistakes."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = {"images_per_s", "tflops_per_device", "mfu", "data_wait", "time"}
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def tensors_in(value, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a nested state, by its path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found |= tensors_in(item, f"{path}/{key}")
    return found


def training_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: parameters, optimizer and EMA, from all of its files."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "state").iterdir()):
        state |= tensors_in(load_file(path), path.name)
    for name in ("model", "ema"):
        state |= tensors_in(load_file(folder / f"{name}.safetensors"), name)
    return state


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    different = [k for k in one if not torch.equal(one[k], other[k])]
    assert not different


# Name -> processes and settings. Each is trained once without a break, for all tests that ask for it.
WHOLE = {
    "torch": (1, ["engine=torch"]),
    "zero0 of two": (2, ["engine.zero=0"]),
    "zero1": (1, ["engine.zero=1"]),
    "zero1 of two": (2, ["engine.zero=1", "log.every=4"]),  # stopped between two lines
    "bf16 of two": (2, ["engine.precision=bf16", "train.micro_batch=4"]),
}
GRID = ("sample.every=5", "sample.num=4", "sample.steps=3")
COMMON = ("train.steps=20", "checkpoint.every=5", "checkpoint.keep=4")


@pytest.fixture(scope="module")
def whole(launcher_in, tmp_path_factory):
    """whole(name) -> the folder of that run of 20 steps: look at it, change copies only."""
    launcher = launcher_in(tmp_path_factory.mktemp("whole"))

    def folder_of(name: str) -> Path:
        folder = launcher.folder / name.replace(" ", "_")
        if not folder.exists():
            world, overrides = WHOLE[name]
            launcher.train(folder.name, *COMMON, *overrides, world=world)
        return folder

    return folder_of


@pytest.mark.parametrize("name", WHOLE)
def test_resume_is_bit_exact(whole, launcher, name):
    """20 steps at once, against the same run continued from its checkpoint at step 10."""
    (world, overrides), one, other = WHOLE[name], whole(name), launcher.folder / "resumed"
    shutil.copytree(one, other)
    for later in (15, 20):
        shutil.rmtree(checkpoint(other, later))
    launcher.train("resumed", *COMMON, *overrides, "checkpoint.resume=must", world=world)
    for step in (15, 20):
        assert_equal(training_state(checkpoint(one, step)), training_state(checkpoint(other, step)))
    assert metrics(one) == metrics(other)
    ema = load_file(checkpoint(one, 20) / "ema.safetensors")
    model = load_file(checkpoint(one, 20) / "model.safetensors")
    assert any(not torch.equal(ema[k], model[k]) for k in ema)


def test_all_engines_and_stages_train_the_same(whole, launcher):
    """Same samples, same t, same noise: ZeRO 0 to 3, DDP and micro-batches agree to rounding, pictures too."""
    settings = {
        "ddp": (2, ["engine=torch", "train.micro_batch=4", *GRID]),
        "zero1": (1, ["engine.zero=1", "train.micro_batch=8"]),
        "zero2": (2, ["engine.zero=2"]),
        "zero3": (2, ["engine.zero=3", *GRID]),
    }
    for name, (world, overrides) in settings.items():
        launcher.train(name, "train.steps=5", *overrides, world=world)
    runs = {name: launcher.folder / name for name in settings}
    runs["zero0"] = whole("zero0 of two")
    for which in ("model", "ema"):
        expected = load_file(checkpoint(whole("torch"), 5) / f"{which}.safetensors")
        for name, run in runs.items():
            found = load_file(checkpoint(run, 5) / f"{which}.safetensors")
            for key, value in expected.items():
                torch.testing.assert_close(
                    found[key], value, rtol=0, atol=2e-5, msg=f"{name} {which} {key}"
                )
    grids = [Image.open(runs[name] / "grids" / "step-00000005.png") for name in ("ddp", "zero3")]
    one, other = (np.asarray(each, dtype=np.int64) for each in grids)
    assert one.std() > 10 and abs(one - other).max() <= 1
    norms = {name: metrics(run)[0]["grad_norm"] for name, run in runs.items()}
    assert all(norm == pytest.approx(norms["ddp"], rel=1e-4) for norm in norms.values()), norms


def test_a_run_goes_on_elsewhere(whole, launcher):
    """ZeRO 1 on two processes, then torch on one in micro-batches, then ZeRO 2 on two, against ZeRO 1 all the way."""
    one, other = whole("zero1 of two"), launcher.folder / "moved"
    shutil.copytree(one, other)
    for later in (10, 15, 20):
        shutil.rmtree(checkpoint(other, later))
    common = ("checkpoint.every=5", "checkpoint.keep=4", "log.every=4", "checkpoint.resume=must")
    where = ("engine=torch", "train.micro_batch=4")
    told = launcher.train("moved", *common, *where, "train.steps=8", world=1)
    assert "engine.kind: deepspeed -> torch" in told and "processes: 2 -> 1" in told
    launcher.train("moved", *common, "engine.zero=2", "train.steps=20", world=2)
    manifest = json.loads((checkpoint(other, 20) / "manifest.json").read_text())
    assert [each["step"] for each in manifest["continued"]] == [5, 8]
    for step in (10, 20):
        for which in ("model", "ema"):
            start, expected, found = (
                load_file(checkpoint(run, at) / f"{which}.safetensors")
                for run, at in ((one, 5), (one, step), (other, step))
            )
            moved, gap = (
                torch.cat([(each[key] - expected[key]).flatten() for key in expected]).norm()
                for each in (start, found)
            )
            assert gap < 1e-5 * moved, (step, which, gap, moved)
    expected, found = (
        {line["step"]: line["loss"] for line in metrics(run)} for run in (one, other)
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_launcher_and_another_folder(launcher):
    """`deepspeed --num_accelerators 1 .../train.py` from elsewhere, as a user types it; test_signals has two."""
    command = launcher.deepspeed(1) + launcher.arguments("run", "train.steps=4", "engine.zero=1")
    answer = subprocess.run(
        command, cwd=launcher.folder, capture_output=True, text=True, timeout=240
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (checkpoint(launcher.folder / "run", 4) / "ema.safetensors").exists()
    manifest = json.loads((launcher.folder / "run" / "manifest.json").read_text())
    assert manifest["processes"] == 1
    of_the_step, of_the_model = (
        {"noise", "loss", "adamw_ema"},
        {"gate_residual_norm_modulate", "bias_gelu"},
    )
    assert {k["op"] for k in manifest["kernels"]} == of_the_step | of_the_model
    # What DeepSpeed and torch say in the process is in its file; the launcher's own lines come from elsewhere.
    assert answer.stderr.count("what libraries say is in") == 1
    assert "Warning: " not in answer.stdout + answer.stderr
    assert "untested optimizer" not in answer.stdout + answer.stderr
    assert "DeepSpeed" in (launcher.folder / "run" / "libraries.log").read_text()


def test_sigterm_saves_and_ends_well(launcher):
    arguments = launcher.arguments("run", "train.steps=100000", "log.every=1")
    (process,) = launcher.start(1, arguments)
    journal = launcher.folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = launcher.wait([process])
    assert "stopped on request" in output
    (folder,) = [p for p in (launcher.folder / "run" / "checkpoints").iterdir() if p.is_dir()]
    step = int(folder.name.removeprefix("step-"))
    assert metrics(launcher.folder / "run")[-1]["step"] == step


def test_kill_nine_loses_only_the_steps_since_the_last_checkpoint(whole, launcher):
    arguments = launcher.arguments("killed", *COMMON)
    (process,) = launcher.start(1, arguments)
    run = launcher.folder / "killed"
    deadline = time.monotonic() + 120
    while not checkpoint(run, 5).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    launcher.train("killed", *COMMON)
    assert_equal(
        training_state(checkpoint(whole("zero1"), 20)), training_state(checkpoint(run, 20))
    )
    assert metrics(whole("zero1")) == metrics(run)


def test_a_finished_run_says_so(whole, launcher):
    shutil.copytree(whole("zero1"), launcher.folder / "run")
    assert "nothing to do" in launcher.train("run", *COMMON)


def test_gradients_that_are_not_finite_change_nothing_and_end_the_run(launcher):
    """A learning rate that explodes: the run stops with its own code and keeps finite weights."""
    output = launcher.train(
        "run",
        "train.steps=400",
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "train.max_bad_steps=5",
        expect=3,
    )
    assert "not finite" in output
