"""Two nodes on one machine: network namespaces joined by a veth pair, each with a launcher of its own.

One node is killed, or the link between them cut, for good or for a moment; then the same two commands go on. What is
left at the end must be what two processes of one machine leave that nobody disturbed. Needs root; without it, says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.distributed.conftest import TRAIN, Launcher, free_port
from tests.sweeps.kills import committed, differences, fingerprints

STEPS, EVERY = 120, 20
STALL, BRIEF = 8.0, 2.0  # seconds: train.stall_seconds, and a cut that is mended before
PATIENCE = 120.0  # seconds for a start and its whole run
BOUND = 45.0  # seconds from a fault until every training has ended
NETWORK = "10.213.77"
COMMON = (
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep=99",
    "log.every=30",
    "model.depth=1",
    f"train.stall_seconds={STALL}",
)
LAUNCHERS = ("deepspeed", "torchrun")
FAULTS = ("node killed", "link cut", f"link cut for {BRIEF:g} s", "link cut in a save")
CASES = {
    f"{launcher}, ZeRO {zero}, {fault}": (launcher, zero, fault)
    for launcher in LAUNCHERS
    for zero in (1, 2)
    for fault in FAULTS
    if fault == FAULTS[0] or (launcher, zero) in (("deepspeed", 1), ("torchrun", 2))
}


class Nodes:
    """Two namespaces with addresses .1 and .2, each with its end of the pair as eth0."""

    def __init__(self) -> None:
        self.names = [f"faults{os.getpid()}-{side}" for side in "ab"]
        self.addresses = [f"{NETWORK}.1", f"{NETWORK}.2"]

    def link(self, up: bool) -> None:
        """Mend the link, or cut it: packets are lost then, and nobody is told."""
        _ip("-n", self.names[1], "link", "set", "eth0", "up" if up else "down")

    def processes(self, node: int) -> list[int]:
        return [int(word) for word in _ip("netns", "pids", self.names[node]).split()]

    def kill(self, node: int) -> None:
        """SIGKILL to everything that runs on a node, as a loss of power."""
        for number in self.processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def nodes() -> Iterator[Nodes]:
    """The two, gone afterwards. Raises OSError where this machine or user may have none."""
    pair = Nodes()
    try:
        for name in pair.names:
            _ip("netns", "add", name)
        _ip(
            *("link", "add", "eth0", "netns", pair.names[0]),
            *("type", "veth", "peer", "name", "eth0", "netns", pair.names[1]),
        )
        for name, address in zip(pair.names, pair.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
        yield pair
    finally:
        for node, name in enumerate(pair.names):
            with contextlib.suppress(OSError):
                pair.kill(node)
                _ip("netns", "delete", name)


def why_not() -> str:
    """Why there can be no nodes here; empty where they can."""
    try:
        with nodes():
            return ""
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network namespaces here: {error}"


def start(pair: Nodes, launcher: str, words: list[str], folder: Path) -> list[subprocess.Popen]:
    """The same command on both nodes, but for the node's number, as a person types it there."""
    hosts = folder / "hostfile"
    hosts.write_text("".join(f"{address} slots=1\n" for address in pair.addresses))
    place = ["--master_addr", pair.addresses[0], "--master_port", free_port()]
    running = []
    for node, name in enumerate(pair.names):
        own = ["--node_rank", str(node)]
        if launcher == "deepspeed":
            own = ["--hostfile", str(hosts), "--no_ssh", *own]
        else:
            own = ["--nnodes", "2", "--nproc_per_node", "1", *own]
        program = str(Path(sys.executable).with_name(launcher))
        command = ["ip", "netns", "exec", name, program, *own, *place, str(TRAIN), *words]
        told = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0"}
        with (folder / f"node-{node}.txt").open("a") as output:
            running.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**os.environ, **told},
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )
    return running


def case(launcher: Launcher, name: str, expected: dict[str, Any]) -> dict[str, Any]:
    """One fault: what `faults_*.json` keeps of it. expected: the fingerprints of an undisturbed run of its stage."""
    program, zero, fault = CASES[name]
    folder = launcher.folder / name.replace(", ", "-").replace(" ", "_")
    folder.mkdir()
    inner = Launcher(launcher.nest, folder, launcher.data)
    words = inner.arguments("run", *COMMON, f"engine.zero={zero}")
    run, wrong = folder / "run", []
    with nodes() as pair:
        running = start(pair, program, words, folder)
        _wait(lambda: bool(committed(run)) or any(e.poll() is not None for e in running), PATIENCE)
        if fault == FAULTS[3]:  # a folder that is not committed yet
            saving = (run / "checkpoints").glob
            _wait(lambda: bool([*saving("*.partial")]), PATIENCE, every=0.001)
        began = time.monotonic()
        brief = fault == FAULTS[2]
        if fault == FAULTS[0]:
            pair.kill(1)
        else:
            pair.link(up=False)
            if brief:
                time.sleep(BRIEF)
                pair.link(up=True)
        bound = PATIENCE if brief else BOUND
        if not _wait(lambda: not _trainings(pair), bound):
            wrong.append(f"after {bound:g} s a training had not ended")
        seconds = round(time.monotonic() - began, 1)
        _wait(lambda: all(each.poll() is not None for each in running), 10)
        for node in range(2):
            pair.kill(node)
        codes = [each.wait(20) for each in running]
        step = int(committed(run)[-1].removeprefix("step-")) if committed(run) else 0
        if step == 0 or (step == STEPS) != brief:
            wrong.append(f"the fault found the run at step {step}")
        if brief != (codes == [0, 0]):
            wrong.append(f"exit codes {codes}")
        pair.link(up=True)
        if not brief:
            again = start(pair, program, words, folder)
            if [each.wait(PATIENCE) for each in again] != [0, 0]:
                wrong.append("the same commands did not go on")
    apart = differences(expected, fingerprints(run))
    if apart:
        wrong.append(f"differs: {', '.join(apart[:3])}")
    if wrong:
        told = [(folder / f"node-{node}.txt").read_text()[-2000:] for node in range(2)]
        print("\n".join([f"--- {name}", *told]), file=sys.stderr, flush=True)
    return {
        "fault": fault,
        "codes": codes,
        "seconds": seconds,
        "step": step,
        "apart": apart,
        "wrong": wrong,
    }


def undisturbed(launcher: Launcher, zero: int) -> dict[str, Any]:
    """What two processes of one machine leave."""
    name = f"whole-{zero}/run"
    if not (launcher.folder / name).exists():
        launcher.train(name, *COMMON, f"engine.zero={zero}", world=2)
    return fingerprints(launcher.folder / name)


def _trainings(pair: Nodes) -> list[int]:
    """Processes of `train.py`, launchers not among them."""
    found = []
    for number in [*pair.processes(0), *pair.processes(1)]:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            if str(TRAIN).encode() in words[1:4] and b"--hostfile" not in words:
                found.append(number)
    return found


def _wait(there: Any, seconds: float, every: float = 0.02) -> bool:
    until = time.monotonic() + seconds
    while not there():
        if time.monotonic() > until:
            return False
        time.sleep(every)
    return True
