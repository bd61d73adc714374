"""export and import as they are typed: what weights' files tell, what was taken of them, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

NEWEST = Path("checkpoints") / "step-00000020"


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["speed_engine"])


@pytest.fixture(scope="module")
def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / NEWEST / "ema.safetensors")


def test_every_weights_file_says_what_it_is(good, run, tmp_path):
    good("export", "--run", run, "--out", tmp_path / "m.safetensors")
    for path in (tmp_path / "m.safetensors", *sorted((run / NEWEST).glob("[em]*.safetensors"))):
        header = header_of(path)
        assert header["format"] == 2 and len(header["checksum"]) == 64
        assert header["model"]["kind"] == "dit" and header["model"]["num_outputs"] == 2
        label = header["facts"]["conditions"]["label"]
        assert (
            header["facts"]["shape"] == [1, 8, 8] and header["facts"]["space"]["kind"] == "pixels"
        )
        assert label["num_values"] == 10 and label["null"] is True
        assert header["notes"]["step"] == 20


def test_no_weights_file_tells_whose_folder_it_lay_in(good, overrides, data, tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    (home / "data").parent.mkdir(parents=True)
    (home / "data").symlink_to(data)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice")
    words = [word for word in overrides(home / "run") if not word.startswith(("data.", "train.s"))]
    good(
        "train",
        "--config",
        "digits_dit_tiny",
        *words,
        f"data.path={home / 'data'}",
        "train.steps=1",
    )
    good("export", "--run", home / "run", "--out", tmp_path / "m.safetensors")
    out = home / "diffusers"
    good("export", "--run", home / "run", "--out", out, "--format", "diffusers")
    good("import", "--source", out, "--out", tmp_path / "back.safetensors")
    files = [
        *tmp_path.glob("*.safetensors"),
        *(home / "run").rglob("[em]*.safetensors"),
        *(path for path in out.rglob("*") if path.is_file()),
    ]
    assert len(files) == 2 + 2 + 5
    for path in files:
        content = path.read_bytes()
        assert b"alice" not in content and str(tmp_path).encode() not in content, path
    notes = header_of(home / "run" / "checkpoints" / "step-00000001" / "ema.safetensors")["notes"]
    assert notes["run"]["run_dir"] == "run" and notes["run"]["data"]["path"] == "data"


# ------------------------------------------------------------------------------ the label table


def test_what_was_taken_of_a_label_table_is_said(good, command, weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "m.pt")
    words = ["import", "--source", tmp_path / "m.pt", "--out", tmp_path / "m.safetensors"]
    said = "note: a label table of 11 rows, read as "
    for more, taken, values, null in (
        ([], "10 classes and a null label (--num-classes 11: as 11 classes", 10, True),
        (["--num-classes", "10"], "10 classes and a null label", 10, True),
        (["--num-classes", "11"], "11 classes without a null label", 11, False),
    ):
        answer = good(*words, *more)
        assert said + taken in answer.said and "1 channels, taken as pixels" in answer.said
        label = header_of(tmp_path / "m.safetensors")["facts"]["conditions"]["label"]
        assert (label["num_values"], label["null"]) == (values, null)
    answer = command(*words, "--num-classes", "9")
    assert answer.code == 2 and answer.err == (
        f"error: {tmp_path / 'm.pt'} has a label table of 11 rows, so it has 10 (and a null label) or 11 classes"
        " and not 9; correct --num-classes\n"
    )


def test_a_folder_of_diffusers_is_asked_the_same(good, command, run, tmp_path):
    out, back = tmp_path / "diffusers", tmp_path / "m.safetensors"
    good("export", "--run", run, "--out", out, "--format", "diffusers")
    words = ["import", "--source", out, "--out", back, "--frequency-shift", "0"]
    assert "note:" not in good(*words).out  # our own folder leaves nothing open
    assert "exported with 10 classes, not 11" in command(*words, "--num-classes", "11").err
    (out / "transformer" / "speed_engine.json").unlink()
    assert "read as 10 classes and a null label" in good(*words).out
    assert "read as 11 classes without" in good(*words, "--num-classes", "11").out
    answer = command(*words, "--num-classes", "3")
    assert answer.code == 2 and answer.err.count("\n") == 1 and "and not 3" in answer.err


# ------------------------------------------------------------------------------ what is refused


def test_diffusers_has_a_place_for_some_networks_only(good, command, data, run, tmp_path):
    words = ["train", "--config", "digits_dit_tiny", "engine=torch", f"data.path={data}"]
    words += ["train.steps=1", "train.global_batch=8", "model.depth=1", "model.mlp_ratio=2"]
    good(*words, f"run_dir={tmp_path / 'run'}")
    answer = command(
        "export", "--run", tmp_path / "run", "--out", tmp_path / "d", "--format", "diffusers"
    )
    assert answer.code == 2 and answer.err == (
        "error: diffusers cannot hold this model: its DiT has model.mlp_ratio 4, not 2.0;"
        " export it with --format safetensors\n"
    )
    assert not (tmp_path / "d").exists()
    good("export", "--run", tmp_path / "run", "--out", tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("more", "named"),
    [(["--frequency-shift", "1"], "--frequency-shift"), (["--num-heads", "3"], "multiple")],
)
def test_options_that_do_not_apply_are_refused(command, weights, tmp_path, more, named):
    width = {"x_embedder.proj.weight": weights["x_embedder.proj.weight"][:, :, :1, :1]}
    torch.save({"model": weights | width}, tmp_path / "m.pt")
    answer = command("import", "--source", tmp_path / "m.pt", "--out", tmp_path / "o", *more)
    assert answer.code == 2 and named in answer.err and not (tmp_path / "o").exists()


HUGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
from speed_engine.__main__ import main
sys.argv = ["speed_engine", "import", "--source", {source!r}, "--out", {out!r}]
sys.exit(main())
"""


def test_files_that_claim_terabytes_are_refused_at_once(weights, run, good, tmp_path):
    """In a process that may not take more than 32 GB: with a sentence, not for want of memory."""
    table = "y_embedder.embedding_table.weight"
    torch.save({"model": weights | {table: torch.zeros(1).expand(10**11, 128)}}, tmp_path / "m.pt")
    folder = tmp_path / "diffusers"
    good("export", "--run", run, "--out", folder, "--format", "diffusers")
    network = folder / "transformer"
    (network / "speed_engine.json").unlink()
    config = json.loads((network / "config.json").read_text())
    (network / "config.json").write_text(json.dumps(config | {"sample_size": 10**7}))
    for source, named in ((tmp_path / "m.pt", "claim"), (network, "far larger")):
        script = HUGE.format(source=str(source), out=str(tmp_path / "o"))
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and named in done.stderr, done.stderr
        assert done.stderr.startswith(f"error: {source} ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------ a network of one's own

NET = """
import torch
from speed_engine.kinds import Section

TAKES = ()

class Config(Section):
    width: int = 4

class Net(torch.nn.Module):
    def __init__(self, config, facts, num_outputs):
        super().__init__()
        self.config, self.facts, self.num_outputs = config, facts, num_outputs
        self.first = torch.nn.Conv2d(facts.shape[0], config.width, 3, padding=1)
        self.last = torch.nn.Conv2d(config.width, num_outputs, 3, padding=1)

    def forward(self, x, time_B):
        return self.last(torch.tanh(self.first(x)))

def build(config, facts, num_outputs, *, seed=0, device="cpu", dtype=None, backends=None):
    with torch.device("cpu" if str(device) != "meta" else "meta"):
        torch.manual_seed(seed)
        return Net(config, facts, num_outputs).to(device)

def macs_per_sample(config, facts, num_outputs):
    return 64 * 9 * config.width * (facts.shape[0] + num_outputs)
"""


def test_an_outside_network_is_exported_by_those_who_trust_it(
    good, command, data, tmp_path, monkeypatch
):
    (tmp_path / "my_nets").mkdir()
    (tmp_path / "my_nets" / "conv.py").write_text(NET)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    run, out = tmp_path / "run", tmp_path / "m.safetensors"
    words = ["train", "--config", "digits_dit_tiny", "engine=torch", f"data.path={data}"]
    words += ["train.steps=1", "train.global_batch=8", "model.kind=my_nets.conv", "model.width=3"]
    good(*words, "conditions.label=null", f"run_dir={run}")
    export = ["export", "--run", run, "--out", out]
    for module in ("my_nets", "my_nets.conv"):
        monkeypatch.delitem(sys.modules, module)
    answer = command(*export)
    assert answer.code == 2 and "--trust my_nets.conv" in answer.err
    assert "my_nets" not in sys.modules and not out.exists()
    good(*export, "--trust", "my_nets.conv")
    model = header_of(out)["model"]
    assert model == {"kind": "my_nets.conv", "config": {"width": 3}, "num_outputs": 2}
    answer = command(
        *export[:-1], tmp_path / "d", "--format", "diffusers", "--trust", "my_nets.conv"
    )
    assert answer.code == 2 and answer.err == (
        "error: diffusers' DiT cannot hold a network of model.kind=my_nets.conv;"
        " export it with --format safetensors\n"
    )
