"""What a user can get wrong about training: one sentence, exit code 2, nothing half-written."""

import json
import sys
from pathlib import Path

import pytest

from speed_engine import train


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs train.py's main in this process: (exit code, everything it printed)."""

    def call(*overrides: str, config: str = "digits_dit_tiny") -> tuple[int, str]:
        small = {
            "run_dir": tmp_path / "run",
            "data.path": tmp_path / "data",
            "model.depth": 1,
            "model.hidden_size": 32,
            "model.num_heads": 2,
            "train.global_batch": 8,
            "train.steps": 2,
            "engine": "torch",
        }
        small |= dict(override.split("=", 1) for override in overrides)
        arguments = ["--config", config, *(f"{key}={value}" for key, value in small.items())]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        code = train.main()
        answer = capfd.readouterr()
        return code, answer.out + answer.err

    return call


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_size) for p in folder.rglob("*") if p.name != "lock")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("timesteps.kk=5", ["timesteps.kk", "did you mean 'k'"]),
        ("train.micro_batch=3", ["train.global_batch=8", "train.micro_batch=3", "divisor of 8"]),
        ("checkpoint.resume=must", ["checkpoint.resume=must", "no checkpoint"]),
        ("kernels.backend=triton", ["kernels.backend=triton", "CUDA"]),
        ("engine.device=cuda", ["engine.device=cuda", "engine.device=cpu"]),
        ("data.kind=shards", ["holds no data set", "encode --images"]),
        ("model.patch_size=3", ["patch_size 3", "sample size 8"]),
        ("optim.name=apex", ["optim.name=apex", "adamw_ema"]),
        ("log.wandb=true", ["log.wandb", "pip install wandb"]),
    ],
)
def test_one_sentence_and_code_two(run, tmp_path, override, words):
    code, output = run(override)
    assert code == 2
    for word in words:
        assert word in output, output
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_missing_preset_lists_what_exists(run):
    code, output = run(config="digits_dit_tyni")
    assert code == 2 and "did you mean 'digits_dit_tiny'" in output


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=1e-5", ["another configuration", "config.optim.lr: 0.002 -> 1e-05"]),
        ("checkpoint.resume=never", ["checkpoint.resume=never", "step 2"]),
        ("seed=3", ["config.seed: 0 -> 3"]),
        ("timesteps.kind=uniform", ["config.timesteps.kind: speed -> uniform"]),
    ],
)
def test_a_run_is_not_continued_as_another(run, tmp_path, override, words):
    assert run()[0] == 0
    before = listing(tmp_path / "run")
    code, output = run("train.steps=4", override)
    assert code == 2
    for word in words:
        assert word in output, output
    assert listing(tmp_path / "run") == before


def test_other_data_are_noticed(run, tmp_path):
    assert run()[0] == 0
    code, output = run("train.steps=4", "data.held_out=0.1")
    assert code == 2 and "config.data" in output


def test_what_may_change_may_change(run):
    """Length, logging, checkpoints, the place of the data: not what the run is."""
    assert run()[0] == 0
    assert run("train.steps=3", "log.every=1", "checkpoint.every=1", "checkpoint.keep=1")[0] == 0


def test_the_run_folder_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, output = run(f"run_dir={tmp_path / 'file'}")
    assert code == 2 and str(tmp_path / "file") in output


def test_a_damaged_checkpoint_is_passed_over_and_named(run, tmp_path):
    assert run("checkpoint.every=1")[0] == 0
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, output = run("train.steps=3", "checkpoint.every=1")
    assert code == 0
    assert "model.safetensors" in output and "step-00000002 is damaged" in output
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


def test_only_updates_refused_in_a_row_end_a_run(run, tmp_path):
    """A learning rate that explodes, with a line of the log at every step: five in a row, not one."""
    code, output = run(
        "train.steps=60",
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "train.max_bad_steps=5",
        "log.every=1",
    )
    assert code == 3, output
    assert "5 updates in a row" in output
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["skipped"] for line in lines[-6:]] == [0, 1, 2, 3, 4, 5]
    assert lines[-1]["loss"] is None


@pytest.mark.parametrize("name", ["torch_fused"])
def test_an_optimizer_that_spoils_the_weights_ends_the_run(run, tmp_path, name):
    code, output = run(
        "train.steps=60",
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        f"optim.name={name}",
        "log.every=2",
    )
    assert code == 3, output
    assert "the weights are spoilt" in output
    assert not list(tmp_path.rglob("*.safetensors"))
