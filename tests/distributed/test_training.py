"""The real training program in real processes: resume, world sizes, stages, signals, mistakes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speed_engine.training import sealed

ROOT = Path(__file__).resolve().parents[2]


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = {"images_per_s", "tflops_per_device", "mfu"}
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
    for path in sorted((folder / "state").rglob("*.pt")):
        loaded = torch.load(path, map_location="cpu", weights_only=False)
        state |= tensors_in(loaded, path.name)
    for name in ("model", "ema"):
        state |= tensors_in(load_file(folder / f"{name}.safetensors"), name)
    return state


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    different = [k for k in one if not torch.equal(one[k], other[k])]
    assert not different


def resumed_equals_undisturbed(launcher, world: int, *overrides: str) -> None:
    """20 steps at once, against the same run continued from its checkpoint at step 10."""
    folder = launcher.folder
    common = ("train.steps=20", "checkpoint.every=10", *overrides)
    launcher.train("whole", *common, world=world)
    shutil.copytree(folder / "whole", folder / "resumed")
    shutil.rmtree(checkpoint(folder / "resumed", 20))
    launcher.train("resumed", *common, "checkpoint.resume=must", world=world)
    assert_equal(
        training_state(checkpoint(folder / "whole", 20)),
        training_state(checkpoint(folder / "resumed", 20)),
    )
    assert metrics(folder / "whole") == metrics(folder / "resumed")
    ema = load_file(checkpoint(folder / "whole", 20) / "ema.safetensors")
    model = load_file(checkpoint(folder / "whole", 20) / "model.safetensors")
    assert any(not torch.equal(ema[k], model[k]) for k in ema)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("world", [1, 2])
def test_resume_is_bit_exact(launcher, zero, world):
    resumed_equals_undisturbed(launcher, world, f"engine.zero={zero}")


def test_resume_is_bit_exact_in_bf16_with_accumulation(launcher):
    resumed_equals_undisturbed(launcher, 2, "engine.precision=bf16", "train.micro_batch=4")


def test_resume_is_bit_exact_without_deepspeed(launcher):
    resumed_equals_undisturbed(launcher, 1, "engine=torch")


@pytest.mark.parametrize(
    ("before", "now", "reason"),
    [
        ("sdpa_flash", "sdpa_flash", "as before the interruption: it was the fastest"),
        ("sdpa_cudnn", "sdpa", "torch's fused attention on cpu"),  # cannot run on this machine
    ],
)
def test_a_resumed_run_attends_as_before(launcher, before, now, reason):
    """Where attention is measured, a second measurement may come out differently."""
    common = ("engine=torch", "checkpoint.every=2")
    launcher.train("run", "train.steps=2", *common)
    path = checkpoint(launcher.folder / "run", 2) / "manifest.json"
    facts = sealed.read(path)
    assert facts["attention"]["backend"] == "sdpa"
    facts["attention"] |= {"backend": before, "reason": "it was the fastest"}
    path.write_text(json.dumps(sealed.seal(facts)))
    for steps in (4, 6):  # a reason is handed on, not piled up
        output = launcher.train("run", f"train.steps={steps}", *common)
        warned = (
            "attention was computed by sdpa_cudnn before, and is by sdpa from here on" in output
        )
        assert warned == (before != now and steps == 4), output
        resumed = json.loads((launcher.folder / "run" / "manifest.json").read_text())
        assert (resumed["attention"]["backend"], resumed["attention"]["reason"]) == (now, reason)


def test_all_engines_and_stages_train_the_same(launcher):
    """Same samples, same t, same noise: ZeRO 0 to 3, DDP and micro-batches agree to rounding."""
    settings = {
        "torch": (1, ["engine=torch"]),
        "ddp": (2, ["engine=torch", "train.micro_batch=4"]),
        "zero0": (2, ["engine.zero=0"]),
        "zero1": (1, ["engine.zero=1", "train.micro_batch=8"]),
        "zero2": (2, ["engine.zero=2"]),
        "zero3": (2, ["engine.zero=3"]),
    }
    for name, (world, overrides) in settings.items():
        launcher.train(name, "train.steps=5", *overrides, world=world)
    for which in ("model", "ema"):
        expected = load_file(checkpoint(launcher.folder / "torch", 5) / f"{which}.safetensors")
        for name in settings:
            found = load_file(checkpoint(launcher.folder / name, 5) / f"{which}.safetensors")
            for key, value in expected.items():
                torch.testing.assert_close(
                    found[key], value, rtol=0, atol=2e-5, msg=f"{name} {which} {key}"
                )


def test_the_launcher_and_another_folder(launcher):
    """`deepspeed --num_accelerators 2 .../train.py` from elsewhere, as a user types it."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command += [str(ROOT / "speed_engine" / "train.py")]
    command += launcher.arguments("run", "train.steps=4", "engine.zero=1")
    answer = subprocess.run(
        command, cwd=launcher.folder, capture_output=True, text=True, timeout=240
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (checkpoint(launcher.folder / "run", 4) / "ema.safetensors").exists()
    manifest = json.loads((launcher.folder / "run" / "manifest.json").read_text())
    assert manifest["processes"] == 2
    of_the_step, of_the_model = (
        {"noise", "loss", "adamw_ema"},
        {"gate_residual_norm_modulate", "bias_gelu"},
    )
    assert {k["op"] for k in manifest["kernels"]} == of_the_step | of_the_model


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


def test_kill_nine_loses_only_the_steps_since_the_last_checkpoint(launcher):
    common = ("train.steps=30", "checkpoint.every=5", "log.every=5")
    launcher.train("whole", *common)
    arguments = launcher.arguments("killed", *common)
    (process,) = launcher.start(1, arguments)
    folder = checkpoint(launcher.folder / "killed", 10)
    deadline = time.monotonic() + 120
    while not folder.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    launcher.train("killed", *common)
    assert_equal(
        training_state(checkpoint(launcher.folder / "whole", 30)),
        training_state(checkpoint(launcher.folder / "killed", 30)),
    )
    assert metrics(launcher.folder / "whole") == metrics(launcher.folder / "killed")


def test_a_finished_run_says_so(launcher):
    launcher.train("run", "train.steps=2")
    assert "nothing to do" in launcher.train("run", "train.steps=2")


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


@pytest.mark.parametrize("kind", ["adaptive", "infonoise"])
def test_methods_that_learn_agree_on_any_number_of_processes(launcher, kind):
    """A pair learns one table (the engine compares them when it saves), a resumed pair the same, and
    for InfoNoise it is the table that one process learns. The rewards of `adaptive` are differences
    of nearly equal losses, in which rounding, and so the split of the batch, is visible."""
    common = (f"timesteps.kind={kind}", "engine.zero=1", "train.steps=60", "checkpoint.every=50")
    launcher.train("two", *common, world=2)
    shutil.copytree(launcher.folder / "two", launcher.folder / "resumed")
    shutil.rmtree(checkpoint(launcher.folder / "resumed", 60))
    launcher.train("resumed", *common, "checkpoint.resume=must", world=2)

    def learned(run: str) -> dict[str, torch.Tensor]:
        return load_file(checkpoint(launcher.folder / run, 60) / "timesteps.safetensors")

    two = learned("two")
    assert_equal(two, learned("resumed"))
    if kind == "adaptive":
        return
    launcher.train("one", *common)
    one = learned("one")
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_each_run_has_a_folder_of_its_own(launcher):
    """Without run_dir, other settings never meet in one folder, and the same settings go on there."""
    arguments = launcher.arguments("unused", "train.steps=2")
    arguments = [word for word in arguments if not word.startswith("run_dir=")]
    for extra in ([], ["seed=1"], ["train.steps=3"]):
        kept = [w for w in arguments if w.split("=")[0] not in {e.split("=")[0] for e in extra}]
        launcher.wait(launcher.start(1, kept + extra))
    folders = sorted((launcher.folder / "runs").iterdir())
    assert len(folders) == 2 and all(f.name.startswith("digits_dit_tiny-") for f in folders)
    steps = [{int(c.name[5:]) for c in (f / "checkpoints").glob("step-*")} for f in folders]
    assert sorted(map(max, steps)) == [2, 3]
