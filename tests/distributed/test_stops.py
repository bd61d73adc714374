"""Requests to stop, processes that die or freeze, folders that vanish: bounded ends, one sentence, a code each."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import free_port
from tests.distributed.warm import Warm

TRAIN = Path(__file__).resolve().parents[2] / "speed_engine" / "train.py"
FOR_EVER = ("train.steps=100000", "log.every=1", "model.depth=1", "checkpoint.every=100000")
SLOW = (*FOR_EVER, "data.kind=tests.distributed.stalling", "data.seconds=0.2")
STOPPED, REQUEUED, LOST = 0, 75, 4


@pytest.fixture
def training(launcher):
    """start(world, *overrides): processes that train already; what is left of them is killed in the end."""
    started: list[subprocess.Popen] = []

    def start(world: int, *overrides: str) -> list[subprocess.Popen]:
        lines = num_lines(launcher)
        processes = launcher.start(world, launcher.arguments("run", *overrides))
        started.extend(processes)
        until(lambda: num_lines(launcher) >= lines + 3, processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.wait()


def num_lines(launcher) -> int:
    journal = launcher.folder / "run" / "metrics.jsonl"
    return journal.read_text().count("\n") if journal.exists() else 0


def until(happened, processes=(), seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def ended(processes: list[subprocess.Popen], within: float = 40) -> tuple[list[int], list[str]]:
    outputs = [process.communicate(timeout=within)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def saved_steps(launcher) -> list[int]:
    folders = (launcher.folder / "run" / "checkpoints").glob("step-????????")
    return sorted(int(folder.name[5:]) for folder in folders)


def test_a_stop_of_two_processes_and_what_happens_beside(launcher, training):
    """Slow steps; a second run in the folder; SIGUSR1 to one process; a frozen one; a killed one; one in a save."""
    pair = training(2, *SLOW)
    second = launcher.start(2, launcher.arguments("run", *SLOW))
    codes, outputs = ended(second)
    assert codes == [2, 2], outputs
    assert "is in use by process" in outputs[0] and "Traceback" not in "".join(outputs)
    assert "error" not in outputs[1], outputs[1]

    pair[1].send_signal(signal.SIGUSR1)
    codes, outputs = ended(pair)
    assert codes == [REQUEUED, REQUEUED], outputs
    (step,) = saved_steps(launcher)
    assert f"step {step} is saved" in outputs[0]

    pair = training(2, *SLOW, "train.stall_seconds=3")
    pair[1].send_signal(signal.SIGSTOP)
    assert pair[0].wait(30) == LOST
    words = pair[0].communicate()[0]
    assert "train.stall_seconds=3" in words and f"continues from step {step}" in words
    assert f"process 1 (pid {pair[1].pid}" in words and "Traceback" not in words
    pair[1].kill()

    pair = training(2, *SLOW)
    pair[1].kill()
    assert pair[0].wait(30) == LOST
    words = pair[0].communicate()[0]
    assert f"process 1 (pid {pair[1].pid} on" in words and "is gone" in words, words
    assert "Traceback" not in words
    assert saved_steps(launcher) == [step]

    # Nearly all of its time it saves; a save may take half an hour, but not while nobody writes.
    pair = training(2, *FOR_EVER, "checkpoint.every=1", "train.stall_seconds=3")
    pair[1].send_signal(signal.SIGSTOP)
    assert pair[0].wait(30) == LOST
    words = pair[0].communicate()[0]
    assert "train.stall_seconds=3" in words and f"process 1 (pid {pair[1].pid}" in words, words
    assert f"continues from step {saved_steps(launcher)[-1]}" in words
    pair[1].kill()


def test_one_process_saves_while_its_storage_hangs_and_then_loses_its_folder(launcher, training):
    (one,) = training(1, *SLOW, "data.seconds=0")
    (launcher.folder / "hang-0").touch()
    time.sleep(1.0)
    one.send_signal(signal.SIGHUP)
    codes, outputs = ended([one], within=30)
    assert codes == [STOPPED] and "stopped on request" in outputs[0], outputs
    assert len(saved_steps(launcher)) == 1

    (launcher.folder / "hang-0").unlink()
    (one,) = training(1, *SLOW, "data.seconds=0")
    shutil.rmtree(launcher.folder / "run")
    codes, outputs = ended([one])
    assert codes == [2] and "was removed" in outputs[0] and "Traceback" not in outputs[0], outputs
    assert len(saved_steps(launcher)) == 1 and "is saved there again" in outputs[0]


def test_a_signal_before_the_first_step_ends_at_once(launcher, training):
    (one,) = launcher.start(1, launcher.arguments("run", *SLOW))
    until((launcher.folder / "run").exists, [one])
    one.send_signal(signal.SIGTERM)
    codes, outputs = ended([one], within=30)
    if "stopped on request" not in outputs[0]:  # it had come to its first step by then
        assert codes == [128 + signal.SIGTERM] and "nothing is lost" in outputs[0], outputs


STARTER = f"""
import os, runpy, sys
if os.fork():
    os.wait()
    os._exit(0)
sys.path[0] = {str(TRAIN.parent)!r}
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""


@pytest.fixture
def starter(launcher):
    """start(world, port, *overrides): a launcher of the first process of a run; the output is of both."""
    program = launcher.folder / "starter.py"
    program.write_text(STARTER)

    def start(world: int, port: str, *overrides: str) -> Warm:
        words = [str(program), *launcher.arguments("run", *overrides)]
        return Warm(launcher.nest, words, env=first_of(world, port), cwd=str(launcher.folder))

    return start


def first_of(world: int, port: str) -> dict[str, str]:
    """The environment of the first process."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def test_processes_whose_launcher_is_killed_save_and_end(launcher, starter):
    process = starter(1, free_port(), *FOR_EVER)
    until(lambda: num_lines(launcher) >= 3, [process])
    process.kill()
    output = process.communicate(timeout=40)[0]  # ends when the training has ended, too
    assert "is gone: a request to stop" in output and "stopped on request" in output, output
    assert len(saved_steps(launcher)) == 1


def test_who_does_not_come_is_named_and_who_waits_ends_with_its_launcher(launcher, starter):
    """Of three processes two are killed before they have met the first."""
    words = [str(TRAIN), *launcher.arguments("run", *FOR_EVER, "train.meeting_seconds=2")]
    place = first_of(3, free_port())
    first, *others = (
        Warm(launcher.nest, words, env=place | {"RANK": rank}, cwd=str(launcher.folder))
        for rank in "012"
    )
    for other in others:
        other.kill()
    (code,), (output,) = ended([first])
    assert code == LOST and "within 2 s: 1, 2;" in output and "Traceback" not in output, output

    process = starter(2, port := free_port(), *FOR_EVER)
    until(lambda: socket.socket().connect_ex(("127.0.0.1", int(port))) == 0, [process])
    process.kill()
    output = process.communicate(timeout=20)[0]
    assert "was gone before the first step; nothing is lost" in output, output
    assert not (launcher.folder / "run").exists()


def test_folders_that_processes_do_not_share_are_noticed_at_the_start(launcher):
    pair = []
    port = free_port()
    for rank in (0, 1):
        node = launcher.folder / f"node{rank}"
        node.mkdir()
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        words = [str(TRAIN), *launcher.arguments("run", *FOR_EVER, "run_dir=run")]
        process = Warm(launcher.nest, words, env={**os.environ, **place}, cwd=str(node))
        pair.append(process)
    codes, outputs = ended(pair, within=90)
    assert codes == [2, 2], outputs
    assert "error (process 1): process 1 on" in outputs[1], outputs
    assert "does not see the run folder" in outputs[1] and "error" not in outputs[0], outputs
    assert "Traceback" not in "".join(outputs)
