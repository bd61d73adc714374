"""Batches ahead of their step: who reads what when, and when a failure is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from speed_engine.distributed import Processes
from speed_engine.training.reading import Reading


class Pair(Processes):
    """One of two processes; notes what needs the other."""

    def end_together(self, failure: BaseException | None) -> None:
        asked.append(failure)
        if failure is not None:
            raise failure


asked: list[BaseException | None] = []


def reading(world: int, end: int, bad: int | None = None) -> tuple[Reading, list[int]]:
    """(of `end` steps of which `bad` cannot be read, the steps that were read)."""
    asked.clear()
    done: list[int] = []

    def read() -> Any:
        if len(done) == bad:
            raise ValueError(f"step {bad}")
        done.append(len(done))
        return [done[-1]]

    processes = (Pair if world > 1 else Processes)(0, world, 0, torch.device("cpu"))
    return Reading(read, processes, 0, end), done


def test_one_process_reads_what_it_needs_when_it_needs_it() -> None:
    here, done = reading(1, 3)
    for step in range(3):
        assert here.next() == [step] and here.look_ahead() and done == list(range(step + 1))


def test_many_read_two_steps_ahead_and_ask_no_more_after_the_second() -> None:
    here, done = reading(2, 6)
    for step in range(6):
        assert here.next() == [step]
        assert len(asked) == min(2, step + 1)
        assert here.look_ahead() and len(done) == min(6, step + 3)


@pytest.mark.parametrize("bad", range(6))
def test_a_failure_is_told_before_its_step_begins(bad: int) -> None:
    """As the loop does: what `look_ahead` says after a step is known to all after the next one."""
    here, _ = reading(2, 6, bad)
    told, arriving = True, True
    for step in range(6):
        if not told:
            assert step == bad > 1
            with pytest.raises(ValueError, match=f"step {bad}"):
                here.end_together()
            return
        try:
            assert here.next() == [step]
        except ValueError:
            assert step == bad <= 1
            return
        told, arriving = arriving, here.look_ahead()
    pytest.fail("nobody was told")
