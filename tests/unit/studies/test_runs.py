"""How cells are started, kept and stopped; their processes are stand-ins of one line of Python."""

import errno
import json
import subprocess
import sys

import pytest

from speed_engine.studies import runs
from speed_engine.studies.runs import StudyError
from speed_engine.studies.study import Cell, check

CELLS = [Cell("base", method, seed, {}) for seed in (0, 1) for method in ("uniform", "speed")]


@pytest.fixture
def study():
    methods = {"uniform": {}, "speed": {}}
    tree = {"name": "x", "preset": "digits_dit_tiny", "methods": methods, "seeds": [0, 1]}
    return check({**tree, "steps": 8, "cadence": 2, "metric": "mse"})


@pytest.fixture
def cells_do(monkeypatch):
    """cells_do(code): what every cell's process runs; it has ended and its result is where it was."""

    def stand_in(code: str) -> None:
        monkeypatch.setattr(
            runs, "command", lambda config: [sys.executable, "-c", code, str(config)]
        )

    monkeypatch.setattr(runs, "_complete", lambda run, steps: True)
    monkeypatch.setattr(
        runs,
        "result_of",
        lambda cell, study, run, diverged: {"status": "diverged" if diverged else "finished"},
    )
    stand_in("")
    return stand_in


def results(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("seed*.json"))}


def test_every_cell_is_run_once(study, cells_do, tmp_path, capsys):
    cells_do("import sys; print('ran', file=open(sys.argv[1] + '.ran', 'a'))")
    runs.train(study, CELLS, tmp_path, jobs=3)
    runs.train(study, CELLS, tmp_path, jobs=3)
    assert len(results(tmp_path)) == 4
    for path in tmp_path.rglob("*.ran"):
        assert path.read_text() == "ran\n"
    out = capsys.readouterr().out
    assert "4/4" in out and "4 of 4 cells had ended already" in out


def test_divergence_is_a_result(study, cells_do, tmp_path):
    cells_do("import sys; sys.exit(3 if 'speed' in sys.argv[1] else 0)")
    runs.train(study, CELLS, tmp_path, jobs=2)
    status = [json.loads(runs.result_path(tmp_path, c).read_text())["status"] for c in CELLS]
    assert status == ["finished", "diverged"] * 2


def test_a_failing_cell_stops_the_study_and_is_quoted(study, cells_do, tmp_path):
    cells_do(
        "import sys; print('error: no such data'); sys.exit(2 if 'speed' in sys.argv[1] else 0)"
    )
    with pytest.raises(
        StudyError, match=r"cell base/speed/seed0 failed: no such data \(all it said: .*log\)"
    ):
        runs.train(study, CELLS, tmp_path, jobs=1)
    kept = results(tmp_path)
    assert set(kept) == {"base/uniform/seed0.json"}
    cells_do("")
    runs.train(study, CELLS, tmp_path, jobs=1)
    assert kept.items() <= results(tmp_path).items() and len(results(tmp_path)) == 4


def test_a_full_disk_loses_no_finished_cell(study, cells_do, tmp_path, monkeypatch):
    real, written = runs.write_json, []

    def full_after_two(path, value):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(path, value)

    monkeypatch.setattr(runs, "write_json", full_after_two)
    with pytest.raises(OSError, match="No space left"):
        runs.train(study, CELLS, tmp_path, jobs=1)
    kept = results(tmp_path)
    assert len(kept) == 2
    monkeypatch.setattr(runs, "write_json", real)
    runs.train(study, CELLS, tmp_path, jobs=1)
    assert kept.items() <= results(tmp_path).items() and len(results(tmp_path)) == 4


def test_a_cell_that_a_killed_study_left_running_is_waited_for(study, cells_do, tmp_path, capsys):
    """Its process holds the lock that it inherited; two processes never work on one cell."""
    held = runs._claim(tmp_path / CELLS[0].name)
    assert held is not None
    with held:
        code = "import time; time.sleep(2); print('left')"
        left = subprocess.Popen([sys.executable, "-c", code], pass_fds=[held.fileno()])
    assert runs._claim(tmp_path / CELLS[0].name) is None
    runs.train(study, CELLS, tmp_path, jobs=2)
    assert left.poll() == 0  # it had ended before its cell was taken up
    assert "waiting for cells that a killed compare left running" in capsys.readouterr().out
    assert len(results(tmp_path)) == 4


def test_the_folder_belongs_to_one_study(study, tmp_path):
    runs.claim(tmp_path / "a", study).close()
    runs.claim(tmp_path / "a", study).close()
    other = study.model_copy(update={"seeds": (0, 1, 2)})
    with pytest.raises(StudyError, match=r"holds another study \(seeds differ\)"):
        runs.claim(tmp_path / "a", other)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "diary.txt").touch()
    with pytest.raises(StudyError, match="holds something else than a study"):
        runs.claim(tmp_path / "b", study)
