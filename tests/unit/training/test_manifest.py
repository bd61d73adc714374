"""What of a manifest must be equal for a run to go on, and what a manifest does not tell."""

import re
from pathlib import Path

import pytest
import torch

from speed_engine import config as configuration
from speed_engine.distributed import Processes
from speed_engine.training import assembly, manifest

DESIGN = Path(__file__).resolve().parents[3] / "speed_engine" / "DESIGN.md"
ALONE = Processes(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """described(overrides...) -> the manifest of that run."""
    data = tmp_path_factory.mktemp("digits")

    def describe(*overrides: str) -> dict:
        small = [
            f"data.path={data}",
            "model.depth=1",
            "model.hidden_size=32",
            "model.num_heads=2",
            "train.global_batch=8",
            "engine=torch",
        ]
        config = configuration.load("digits_dit_tiny", [*small, *overrides])
        parts = assembly.build(config, ALONE)
        return manifest.describe(parts, {"engine": "torch", "distribution": "one process"})

    return describe


def test_the_table_in_the_design_is_the_code():
    text = DESIGN.read_text(encoding="utf-8").split("## What may change", 1)[1].split("##", 1)[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE))
    assert rows == manifest.MAY_CHANGE


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.micro_batch=4", ["train.micro_batch: None -> 4"]),
        ("engine.device=cpu", ["engine.device: auto -> cpu"]),
        ("engine.compile=block", ["engine.compile: off -> block"]),
        ("model.recompute=full", ["model.recompute: none -> full"]),
        ("kernels.backend=reference", ["kernels.backend: auto -> reference"]),
        ("train.max_bad_steps=7", []),
        ("checkpoint.every=3", []),
        ("sample.every=50", []),
    ],
)
def test_what_may_change_is_no_other_run_and_is_told(described, override, told):
    before, now = described(), described(override)
    assert manifest.comparable(before) == manifest.comparable(now)
    assert manifest.free_changes(before, now) == told


@pytest.mark.parametrize("override", ["optim.lr=1", "model.patch_size=1", "engine.precision=bf16"])
def test_what_changes_the_result_is_another_run(described, override):
    assert manifest.comparable(described()) != manifest.comparable(described(override))


def test_state_of_earlier_versions_fits_one_place(described):
    """What goes anywhere as shards does not as DeepSpeed's own files; the seed never may."""
    base = {"deepspeed_json": {}, "processes": 2}
    one, two = (described("engine.kind=deepspeed", f"engine.zero={zero}") | base for zero in (1, 2))
    torch_ = described() | {"processes": 1}
    assert (
        manifest.changed(one, two, shards=True) == manifest.changed(one, torch_, shards=True) == []
    )
    assert manifest.changed(one, two, shards=False) == ["config.engine.zero: 1 -> 2"]
    moved = manifest.changed(one, torch_, shards=False)
    assert moved[0] == "config.engine.kind: deepspeed -> torch" and "processes: 2 -> 1" in moved
    assert manifest.changed(torch_, torch_ | {"processes": 3}, shards=False) == []
    seeded = described("seed=3") | {"processes": 1}
    assert manifest.changed(one, seeded, shards=True) == ["config.seed: 0 -> 3"]
    told = manifest.free_changes(one, torch_)
    assert told == ["engine.kind: deepspeed -> torch", "processes: 2 -> 1"]


def test_a_json_counts_between_two_runs_of_deepspeed(described, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"overlap_comm": false}}')
    plain = described("engine.kind=deepspeed") | {"deepspeed_json": {}}
    told = {"deepspeed_json": {"zero_optimization": {"overlap_comm": False}}}
    with_json = described("engine.kind=deepspeed", f"engine.json_file={path}") | told
    assert "json_file" in manifest.changed(plain, with_json, shards=True)[0]
    assert manifest.changed(described(), with_json, shards=True) == []


def test_a_manifest_tells_no_place_of_its_machine(described, tmp_path):
    text = str(described(f"run_dir={tmp_path}/run"))
    assert str(tmp_path.parent) not in text and str(Path.home()) not in text


def test_differences():
    old = {"a": 1, "b": {"c": 2, "d": 3}}
    new = {"a": 1, "b": {"c": 5, "d": 3}, "e": 4}
    assert manifest.differences(old, new) == ["b.c: 2 -> 5", "e: None -> 4"]
