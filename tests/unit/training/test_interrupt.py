"""Signals ask for a stop; only a person's second Ctrl-C ends at once."""

import itertools
import signal
import subprocess
import sys

import pytest

from speed_engine.training.interrupt import SIGNALS, Interrupt

IMPATIENT = """
import signal
from speed_engine.training.interrupt import Interrupt
with Interrupt():
    for number in {numbers}:
        signal.raise_signal(number)
    print("still here", flush=True)
"""


@pytest.fixture(autouse=True)
def nobody_ignores_hangups():
    """`nohup make test` would: what a process is told to ignore stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def after(*numbers: int) -> tuple[int, str]:
    code = IMPATIENT.format(numbers=[int(number) for number in numbers])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("numbers", itertools.product(SIGNALS, repeat=2))
def test_two_signals_are_one_request(numbers):
    if numbers == (signal.SIGINT, signal.SIGINT):
        assert after(*numbers) == (-signal.SIGINT, "")
        return
    with Interrupt() as interrupt:
        assert not interrupt.requested
        for number in numbers:
            signal.raise_signal(number)
            assert interrupt.requested


def test_what_launchers_send_in_between_does_not_hide_the_second():
    one, other = signal.SIGINT, signal.SIGTERM
    assert after(one, other, other, one) == (-signal.SIGINT, "")
    assert after(other, one, other) == (0, "still here\n")


def test_afterwards_all_is_as_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupt():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
