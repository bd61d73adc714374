"""The guard counts refused updates in a row, whatever lies between two lines of the log."""

import math

import pytest
import torch

from speed_engine.training.guard import Guard


def told(pattern: str, limit: int, every: int, device: bool = True) -> list[bool]:
    """Whether each verdict stops; pattern: x a refused update, . an applied one; a verdict after `every` updates."""
    count = torch.zeros(()) if device else 0
    guard, verdicts = Guard(limit, count), []
    for number, update in enumerate(pattern, start=1):
        if update == "x":
            count += 1  # in place: the optimizer's own counter
        guard.update(count)
        if number % every == 0:
            verdicts.append(guard.verdict(1.0) is not None)
    return verdicts


@pytest.mark.parametrize("device", [True, False])
@pytest.mark.parametrize(
    ("pattern", "limit", "every", "expected"),
    [
        ("xx.xx.xx.xx.", 3, 3, [False] * 4),  # a good one starts the count again
        ("xx.xx.xxx...", 3, 3, [False, False, True, False]),  # ended before the line, yet it was
        (".xx.xxx.", 3, 8, [True]),
        ("..xx" + "xx..", 4, 4, [False, True]),  # in a row across a line
        ("xxxx", 2, 1, [False, True, True, True]),
        ("xx", 5, 1, [False, False]),  # two lines of one refused each are not five
        ("x" * 10, 10, 5, [False, True]),
        ("....", 1, 2, [False, False]),
        ("...x", 1, 2, [False, True]),
    ],
)
def test_only_a_row_counts(pattern, limit, every, expected, device):
    assert told(pattern, limit, every, device) == expected


def test_too_many_in_a_window_and_which_they_were():
    guard = Guard(3, 0, step=100, window=6, most=3)
    for count in (1, 1, 2, 2, 2, 2, 3, 3):  # steps 100, 102 and 106: two of any six
        guard.update(count)
    assert guard.verdict(1.0) is None and guard.bad == [100, 102, 106]
    for count in (4, 4, 5):  # 108 and 110, and 106 of the line before
        guard.update(count)
    assert "3 of 6 updates" in (guard.verdict(1.0) or "")
    assert guard.bad == [108, 110] and guard.guilty == [106, 108, 110]


def test_the_count_starts_where_the_run_is_resumed():
    guard = Guard(2, torch.tensor(40.0))
    guard.update(torch.tensor(40.0))
    assert guard.verdict(1.0) is None
    guard.update(torch.tensor(41.0))
    guard.update(torch.tensor(42.0))
    assert "2 updates in a row" in (guard.verdict(1.0) or "")


def test_weights_that_are_spoilt_are_noticed():
    """An optimizer that applies what is not finite counts nothing."""
    guard = Guard(5, 0)
    guard.update(0)
    assert guard.verdict(2.0) is None
    for loss in (math.nan, math.inf):
        guard.update(0)
        assert "spoilt" in (guard.verdict(loss) or "")
    guard.update(1)  # refused: the weights are as they were
    assert guard.verdict(math.nan) is None
