"""`compare` end to end: killed in the middle and continued, a cell that diverges, and a folder of another study."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from speed_engine.studies import runs
from speed_engine.studies.study import load

STUDY = {
    "preset": "digits_dit_tiny",
    "overrides": {
        "engine": "torch",
        "model": {"hidden_size": 32, "depth": 1, "num_heads": 2},
        "train": {"global_batch": 16},
        "optim": {"warmup_steps": 4, "ema_decay": 0.8},
    },
    "methods": {"uniform": {"timesteps": "uniform"}, "burst": {"optim": {"lr": 1e9}}},
    "seeds": [0, 1],
    "steps": 24,
    "cadence": 6,
    "metric": "mse",
}


@pytest.fixture(scope="module")
def study(data, tmp_path_factory):
    """(study file, folder) of a study that was killed with -9 after its first cell and then ended."""
    root = tmp_path_factory.mktemp("compare")
    STUDY["overrides"]["data"] = {"kind": "digits", "path": str(data)}
    file, out = root / "small.yaml", root / "out"
    file.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return file, out


def start(file, out) -> subprocess.Popen:
    words = [sys.executable, "-m", "speed_engine", "compare", str(file), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*words, "--jobs", "1"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_study_continues_without_losing_or_redoing_a_cell(study, good):
    file, out = study
    process = start(file, out)
    first, second = (out / "base" / name / "seed0" for name in ("uniform", "burst"))
    while not second.with_suffix(".log").exists():  # the second cell is under way
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = first.with_suffix(".json").read_bytes(), first.with_suffix(".json").stat().st_mtime_ns
    log = first.with_suffix(".log").read_bytes()
    answer = good("compare", file, "--out", out, "--jobs", "2")
    assert "1 of 4 cells had ended already" in answer.out
    assert kept == (
        first.with_suffix(".json").read_bytes(),
        first.with_suffix(".json").stat().st_mtime_ns,
    )
    assert first.with_suffix(".log").read_bytes() == log
    assert "4/4" in answer.out and "left" in answer.out
    stored = json.loads((out / "report" / "report.json").read_text())
    status = {(c["method"], c["seed"]): c["status"] for c in stored["cells"]}
    assert status == {
        (m, s): e for m, e in (("uniform", "finished"), ("burst", "diverged")) for s in (0, 1)
    }
    curve = stored["cells"][0]["curve"]
    assert curve["steps"] == [6, 12, 18, 24] and curve["images"][-1] == 24 * 16
    assert curve["seconds"] == sorted(curve["seconds"]) and curve["flops"][-1] > 0
    assert (second / "metrics.jsonl").exists() and (first / "checkpoints").is_dir()  # ordinary runs
    found = stored["findings"]["settings"]["base"]["methods"]["burst"]
    assert found["images"]["needed"] == [None, None] and found["diverged"] == 2
    again = good("compare", file, "--out", out)  # all is there: only the report is made
    assert "4 of 4 cells had ended already" in again.out


def test_a_folder_of_another_study_is_refused(study, tmp_path, command):
    file, _ = study
    runs.claim(tmp_path / "out", load(str(file))).close()
    answer = command("compare", file, "--out", tmp_path / "out", "steps=48")
    assert answer.code == 2
    assert "holds another study (steps differ); choose another --out" in answer.err
