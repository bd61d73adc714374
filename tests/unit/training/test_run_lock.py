"""One run in a folder, told by a lock that says who holds it."""

import json
import os
import shutil

import pytest
import torch

from speed_engine.distributed import Processes
from speed_engine.training import run_lock
from speed_engine.training.run_lock import InUse, RunLock, refuse_other_folders

ALONE = Processes(0, 1, 0, torch.device("cpu"))


def rewritten(folder, **changes):
    holder = json.loads((folder / "lock").read_text())
    (folder / "lock").write_text(json.dumps(holder | changes))


def test_two_runs_cannot_share_a_folder(tmp_path):
    held = RunLock(tmp_path)
    with pytest.raises(InUse, match=f"process {os.getpid()} on .* since 20.*wait for it to end"):
        RunLock(tmp_path)
    held.close()
    RunLock(tmp_path).close()


def test_the_same_machine_under_another_name(tmp_path, monkeypatch):
    held = RunLock(tmp_path)
    monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "renamed")
    with pytest.raises(InUse) as refused:
        RunLock(tmp_path)
    assert "machine is gone" not in str(refused.value)
    held.close()
    RunLock(tmp_path).close()


def test_a_lock_that_outlived_its_machine_or_its_process_is_explained(tmp_path):
    held = RunLock(tmp_path)
    rewritten(tmp_path, boot="another")
    with pytest.raises(InUse, match=r"if that machine is gone.*remove the file `lock`"):
        RunLock(tmp_path)
    rewritten(tmp_path, boot=run_lock._boot(), process=2**22 + 5)  # above what any kernel gives out
    with pytest.raises(InUse, match="left behind; end that one"):
        RunLock(tmp_path)
    (tmp_path / "lock").write_text("process 7 on old")  # of an earlier version
    with pytest.raises(InUse, match="process 7 on old; wait"):
        RunLock(tmp_path)
    held.close()


def test_a_removed_folder_is_noticed_and_another_run_not_disturbed(tmp_path):
    run = tmp_path / "run"
    held = RunLock(run)
    assert not held.retake()
    shutil.rmtree(run)
    assert held.retake() and held.held()
    shutil.rmtree(run)
    other = RunLock(run)
    with pytest.raises(InUse):
        held.retake()
    other.close()


def test_nothing_is_left_of_a_run_that_was_refused(tmp_path):
    RunLock(tmp_path / "runs" / "one").close(undo=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    RunLock(tmp_path / "old").close(undo=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_disk_of_its_own_is_refused(tmp_path, monkeypatch):
    held = RunLock(tmp_path)
    refuse_other_folders(tmp_path, held.token, ALONE)
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    with pytest.raises(ValueError, match="choose a run_dir that all machines share"):
        refuse_other_folders(tmp_path, "another token", ALONE)
    held.close()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    held = RunLock(tmp_path)
    assert held.unlocked is not None and "No locks available" in held.unlocked
    held.close()
