"""A time-step method of one's own, from the command line: trained, sampled, plotted, summed up and exported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speed_engine.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
MINE = """
from pathlib import Path
import torch
from speed_engine.timesteps import Method, MethodConfig

Path(__file__).with_name("imported").touch()

class Config(MethodConfig):
    power: float = 1.0

def build(config, schedule):
    mass = torch.arange(1, schedule.num_rows + 1, dtype=torch.float64) ** config.power
    return Method(mass / mass.sum(), torch.ones_like(mass))
"""
TINY = ["model.depth=1", "train.global_batch=8", "train.steps=2", "log.every=1"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A person's folder: a package my_lab, and a run that train.py made there with its method."""
    folder = tmp_path_factory.mktemp("person")
    (folder / "my_lab").mkdir()
    (folder / "my_lab" / "mine.py").write_text(MINE)
    overrides = ["timesteps=my_lab.mine", "timesteps.power=2", "run_dir=run", "engine=torch", *TINY]
    command = [sys.executable, str(ROOT / "speed_engine" / "train.py"), "--config=digits_dit_tiny"]
    # As a person has it: nothing of this folder is on the path.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *overrides], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def command(lab, monkeypatch, capfd):
    """command(words...) -> (exit code, what was printed), in the person's folder, nothing imported yet."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["speed_engine", *words])
        code = main()
        answer = capfd.readouterr()
        return code, answer.out + answer.err

    monkeypatch.chdir(lab)
    monkeypatch.setattr(sys, "path", [*sys.path, str(lab)])
    for module in [m for m in sys.modules if m.split(".")[0] == "my_lab"]:
        monkeypatch.delitem(sys.modules, module)
    (lab / "my_lab" / "imported").unlink(missing_ok=True)
    return call


COMMANDS = [
    ["sample", "--num=2", "--steps=2", "--sampler=ddim", "--out=samples"],
    ["plot", "--out=plots"],
    ["summary"],
    ["export", "--out=exported.safetensors"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_runs_own_module_is_imported_when_it_is_named(lab, command, words):
    refused, text = command(*words, "--run=run")
    assert refused == 2
    assert "the run run: timesteps.kind names the outside module my_lab.mine" in text
    assert "add --trust my_lab.mine" in text
    assert not (lab / "my_lab" / "imported").exists()
    code, text = command(*words, "--run=run", "--trust=other.module", "--trust=my_lab.mine")
    assert code == 0, text
    assert (lab / "my_lab" / "imported").exists()


def test_the_run_keeps_the_path_and_the_settings(lab, command):
    manifest = json.loads((lab / "run" / "manifest.json").read_text())
    assert manifest["config"]["timesteps"]["kind"] == "my_lab.mine"
    assert manifest["config"]["timesteps"]["power"] == 2.0
    code, _ = command("summary", "--run=run", "--trust=my_lab.mine")
    assert code == 0
    assert json.loads((lab / "run" / "summary.json").read_text())["timesteps"] == "my_lab.mine"


def test_a_run_that_names_its_module_goes_on(lab, command):
    words = ["train", "--config=digits_dit_tiny", "timesteps=my_lab.mine", "timesteps.power=2"]
    words += ["run_dir=run", "engine=torch", *TINY[:2], "train.steps=3", "checkpoint.resume=must"]
    code, text = command(*words)
    assert code == 0, text
    assert "at step 2" in text
