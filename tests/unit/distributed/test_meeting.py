"""Processes that agree through files: all meet, all end together, one tells why; earlier starts mislead nobody."""

import json
import threading
import time

import pytest

from speed_engine.distributed.meeting import Meeting, start_of
from speed_engine.errors import SaidElsewhere

PATIENCE = 5.0  # a beat of 0.1 s
SHORT = 1.0


def together(folder, works, patience=PATIENCE, missing=0):
    """Run works[rank](meeting) each in a meeting of its own; what each ended with: a value or an exception."""
    ends = [None] * len(works)

    def sit(rank):
        try:
            with Meeting(folder, rank, len(works) + missing, patience) as meeting:
                ends[rank] = works[rank](meeting)
        except Exception as error:
            ends[rank] = error

    threads = [threading.Thread(target=sit, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def agreeing(meeting):
    meeting.meet("the same")
    meeting.done = 10 + meeting.rank
    if meeting.rank == 0:
        meeting.wait_for_others()
        return meeting.done_by_all()
    return meeting.rank


def failing(meeting):
    raise ValueError(f"mine, {meeting.rank}")


def failing_later(meeting):
    meeting.meet("the same")
    raise ValueError(f"mine, {meeting.rank}")


def at_work(meeting):
    meeting.meet("the same")
    while True:
        meeting.check()
        time.sleep(0.01)


def quiet(error):
    return type(error) is SaidElsewhere


def test_all_meet_and_nothing_is_left(tmp_path):
    folder = tmp_path / ".set.meeting" / "start"
    assert together(folder, [agreeing] * 3) == [33, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_one_alone_writes_nothing(tmp_path):
    with Meeting(tmp_path / "none", 0, 1) as meeting:
        assert agreeing(meeting) == 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("works", "teller"),
    [
        ([failing, failing, failing], 0),
        ([failing, agreeing, agreeing], 0),
        ([agreeing, agreeing, failing], 2),
        ([agreeing, failing, failing], 1),
        ([failing_later, at_work, at_work], 0),
        ([at_work, at_work, failing_later], 2),
    ],
)
def test_one_tells_why_all_end(tmp_path, works, teller):
    ends = together(tmp_path / ".set.meeting" / "start", works)
    assert type(ends[teller]) is ValueError and str(ends[teller]) == f"mine, {teller}"
    assert [quiet(end) for end in ends] == [rank != teller for rank in range(3)]


def test_other_data_on_one_machine(tmp_path):
    ends = together(tmp_path / "a" / "b", [agreeing, lambda meeting: meeting.meet("another")])
    assert "process 1 (on " in str(ends[0]) and "other data or settings" in str(ends[0])
    assert quiet(ends[1])


def dying(meeting):
    meeting.meet("the same")
    meeting._over.set()  # as after a SIGKILL: no beat any more, and no farewell
    meeting._thread.join()
    meeting.world = 1


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_one_is_noticed_and_named_once(tmp_path, dead):
    works = [dying if rank == dead else at_work for rank in range(3)]
    began = time.monotonic()
    ends = together(tmp_path / "a" / "b", works, SHORT)
    assert time.monotonic() - began < 10 * SHORT
    told = [end for end in ends if type(end) is ValueError]
    assert len(told) == 1 and f"process {dead} (on " in str(told[0])
    assert "the same command continues" in str(told[0])
    assert sum(map(quiet, ends)) == 1


def test_one_that_never_comes_is_named(tmp_path):
    (tmp_path / "b").mkdir()
    with (
        pytest.raises(ValueError, match="process 1 of 2 was not heard of for 1 s"),
        Meeting(tmp_path / "b", 0, 2, SHORT) as meeting,
    ):
        meeting.meet("x")
    with (
        pytest.raises(ValueError, match="process 0 of 2 was not heard of for 1 s"),
        Meeting(tmp_path / "c", 1, 2, SHORT) as meeting,
    ):
        meeting.meet("x")


def test_those_who_came_learn_that_one_did_not(tmp_path):
    ends = together(tmp_path / "a" / "b", [agreeing, agreeing], SHORT, missing=1)
    assert "process 2 of 3 was not heard of for 1 s" in str(ends[0]) and quiet(ends[1])


def test_what_an_earlier_start_left_is_not_believed(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    left = {"word": "old", "host": "gone", "beat": 7, "agreed": "the same", "done": 1000}
    first = {"rank": 0, "state": "failed", "verdict": {"teller": 0, "text": "old"}}
    (folder / "0-old.json").write_text(json.dumps(left | first | {"taken": {"1": "old"}}))
    (folder / "1-old.json").write_text(json.dumps(left | {"rank": 1, "state": "ready"}))
    (folder / "1-torn.json").write_text("{")
    assert together(folder, [agreeing] * 2) == [21, 1]


def test_starts_have_names():
    told = {"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "0"}
    assert start_of(told, 2) == start_of(told | {"RANK": "1"}, 2)
    others = [start_of(told, 3), start_of(told | {"SLURM_JOB_ID": "7"}, 2), start_of({}, 2)]
    assert len({start_of(told, 2), *others}) == 4
