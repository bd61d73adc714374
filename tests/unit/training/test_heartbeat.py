"""Who waits for whom: when nobody works, by the files that all processes write."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from speed_engine.distributed import Processes, Waiting
from speed_engine.training import heartbeat
from speed_engine.training.heartbeat import Pulse


def written(run: Path, rank: int, waits: float = 0.0, **changed: object) -> None:
    """The file of a process that has waited so long."""
    (run / heartbeat.FOLDER).mkdir(exist_ok=True)
    since = time.monotonic() - waits if waits else None
    pulse = Pulse(phase="save", waiting=Waiting(since))
    heartbeat.write(run, rank, pulse)
    path = run / heartbeat.FOLDER / f"{rank:05d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


GONE = 2**22 + 1  # above any process's number


@pytest.mark.parametrize(
    ("others", "vain"),
    [
        ([{"waits": 9.0}, {"waits": 8.5}], True),
        ([{"waits": 9.0}, {"waits": 7.5}], False),  # came later: not for so long yet
        ([{"waits": 9.0}, {}], False),  # writes, and its storage may be slow
        ([{"waits": 9.0}, {"phase": "ended"}], True),
        ([{"waits": 9.0}, {"pid": GONE}], True),
        ([{"waits": 9.0}, {"pid": GONE, "host": "another"}], False),  # nobody can know
        ([{"waits": 9.0}, {"host": "another", "time": time.time() - 3600}], True),  # silent
        ([{"waits": 9.0}], False),  # one has never written: another folder, perhaps
    ],
)
def test_nobody_works(others: list[dict[str, float]], vain: bool, tmp_path: Path) -> None:
    for number, facts in enumerate(others, 1):
        written(tmp_path, number, facts.pop("waits", 0.0), **facts)
    assert heartbeat.none_works(tmp_path, 0, 3, 8.0) is vain


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    written(tmp_path, 1)
    path = tmp_path / heartbeat.FOLDER / "00001.json"
    told = json.loads(path.read_text())
    del told["waits"]
    path.write_text(json.dumps(told))
    beat = heartbeat.read(tmp_path, 1)
    assert beat is not None and beat.waits == 0 and beat.host == socket.gethostname()
    assert beat.pid == os.getpid()


def test_one_process_alone_never_waits() -> None:
    alone = Processes(0, 1, 0, device=None)  # type: ignore[arg-type]
    alone.barrier()
    assert alone.any(True) and alone.from_first(3) == 3 and alone.waiting.since is None
