"""Trainings that are killed (SIGKILL) again and again, each compared to one that was not: every file, bit for bit.

A chain is one run folder: the same command is started, killed at a random moment, and started again, until it comes to
its end. Nothing may be lost: a checkpoint that was there when the processes died is there afterwards, with the bytes
that the undisturbed run wrote, and so is everything else that a run leaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speed_engine.training.heartbeat import FOLDER
from tests.distributed.conftest import TRAIN, Launcher
from tests.distributed.test_training import metrics
from tests.distributed.warm import Warm

STEPS, EVERY = 64, 4
COMMON = (
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep=99",
    "log.every=6",  # not together with a checkpoint: the sums of an open interval are state, too
    "model.depth=1",
    "train.first_step_seconds=60",
    "train.stall_seconds=60",
)
ENGINES = {
    "zero1": ("engine.zero=1",),
    "zero2": ("engine.zero=2",),
    "torch": ("engine=torch",),
    "exact_sums": ("engine=torch", "train.exact_sums=true", "train.micro_batch=4"),
}
WORLDS = (1, 2)
CASES = {f"{name}-{world}": (ENGINES[name], world) for name in ENGINES for world in WORLDS}
CHAIN = 3  # kills of one run folder
MOMENTS = ("any", "training", "saving")
PATIENCE = 240.0  # seconds for a start and its whole run
DEAD_WITHIN = 100.0  # seconds in which those whose neighbour was killed must have ended


@dataclass(frozen=True)
class Kill:
    """One SIGKILL that met living processes.

    moment: how it was drawn: `any` time since the start, `training` after a commit of this start, or `saving`, while a
    folder of a checkpoint was being written. victims: `all`, or `one` of two. seconds: since the start. committed: step
    of the newest checkpoint then, 0 for none. partial: whether an unfinished one was left behind.
    """

    moment: str
    victims: str
    seconds: float
    committed: int
    partial: bool


def fingerprints(run: Path) -> dict[str, Any]:
    """What must be equal: every file with tensors, by its name, and the lines of metrics but for their times."""
    files = sorted((run / "checkpoints").rglob("*.safetensors"))
    found: dict[str, Any] = {
        path.relative_to(run).as_posix(): _digest(path)
        for path in files
        if ".partial" not in path.as_posix()
    }
    return found | {f"metrics {i}": line for i, line in enumerate(metrics(run))}


def _digest(path: Path) -> str:
    """SHA-256 of a safetensors file with its header in one order: the library writes its metadata in any."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True)
    return hashlib.sha256(header.encode() + content[end:]).hexdigest()


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same, or is in one only."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def committed(run: Path) -> list[str]:
    """Names of the whole checkpoints."""
    return sorted(
        path.name for path in run.glob("checkpoints/step-*") if (path / "manifest.json").exists()
        and path.suffix != ".partial"
    )  # fmt: skip


def undisturbed(launcher: Launcher, case: str) -> tuple[dict[str, Any], float]:
    """What the run of a case leaves when nobody kills it, and the seconds that it takes."""
    settings, world = CASES[case]
    seconds = 0.0
    for name in ("first", "whole"):  # the first compiles and writes what later ones find
        began = time.monotonic()
        launcher.train(f"{name}/run", *COMMON, *settings, world=world)
        seconds = time.monotonic() - began
    first, whole = (fingerprints(launcher.folder / name / "run") for name in ("first", "whole"))
    assert not differences(first, whole), f"{case} does not repeat itself even undisturbed"
    return whole, seconds


def chain(
    launcher: Launcher,
    case: str,
    name: str,
    moments: list[str],
    seconds: float,
    draw: random.Random,
) -> tuple[list[Kill], list[str]]:
    """Kills of the run folder NAME/run, until one comes too late, and the names of what was lost in between.

    moments: how each kill is drawn. seconds: what the undisturbed run takes. The run is at its end when this returns.
    """
    settings, world = CASES[case]
    run = launcher.folder / name / "run"  # its last name is part of what is saved
    words = launcher.arguments(f"{name}/run", *COMMON, *settings)
    done: list[Kill] = []
    lost: list[str] = []
    for moment in moments:
        before = committed(run)
        running = launcher.start(world, words)
        kill = _killed(running, run, moment, seconds, draw)
        lost += [f"{name} after a kill" for name in before if name not in committed(run)]
        if kill is None:
            break
        done.append(kill)
    before = committed(run)
    output = launcher.wait(launcher.start(world, words), expect=None)
    lost += [f"{name} after the end" for name in before if name not in committed(run)]
    if f"step-{STEPS:08d}" not in committed(run):
        lost.append(f"the end: {output[-300:]}")
    return done, lost


def _killed(
    running: list[Warm], run: Path, moment: str, seconds: float, draw: random.Random
) -> Kill | None:
    """Kill these processes at a moment; None where they had come to their end before."""
    start, began = committed(run), time.monotonic()
    if moment == "any":
        wait = draw.uniform(0, 0.9 * seconds)
    else:
        _watch(running, lambda: committed(run) != start)
        wait = time.monotonic() - began + draw.uniform(0, 0.2 * seconds)
    _watch(running, lambda: time.monotonic() - began >= wait)
    if moment == "saving":
        _watch(running, lambda: any(run.glob("checkpoints/*.partial")))
        time.sleep(draw.uniform(0, 0.02))
    met = len(list(run.glob(f"{FOLDER}/*.json"))) == len(
        running
    )  # before, only their launcher tells them
    one = len(running) > 1 and draw.random() < 0.4 and met
    victims = [draw.choice(running)] if one else running
    if any(each.poll() is not None for each in running):
        for each in running:
            each.communicate(timeout=PATIENCE)
        return None
    at = time.monotonic() - began
    for each in victims:
        each.kill()
    for each in running:  # where one was killed, the others notice, and end by themselves
        each.communicate(timeout=DEAD_WITHIN)
        assert each.returncode != 0
    names = committed(run)
    partial = any(run.glob("checkpoints/*.partial"))
    newest = int(names[-1].removeprefix("step-")) if names else 0
    return Kill(moment, "one" if one else "all", round(at, 3), newest, partial)


def _watch(running: list[Warm], there: Any) -> None:
    """Wait until `there()`, or until one of the processes has ended."""
    until = time.monotonic() + PATIENCE
    while not there() and all(each.poll() is None for each in running):
        assert time.monotonic() < until, "a training neither went on nor ended"
        time.sleep(0.001)


def sweep(launcher: Launcher, case: str, kills: int, seed: int) -> dict[str, Any]:
    """At least `kills` kills of a case, a few a chain: what `faults_*.json` keeps of it."""
    draw = random.Random(f"{seed} {case}")
    expected, seconds = undisturbed(launcher, case)
    chains: list[dict[str, Any]] = []
    landed = 0
    while landed < kills:
        name, left = f"chain-{len(chains)}", min(CHAIN, kills - landed)
        moments = [MOMENTS[(landed + i) % len(MOMENTS)] for i in range(left)]
        done, lost = chain(launcher, case, name, moments, seconds, draw)
        apart = differences(expected, fingerprints(launcher.folder / name / "run"))
        chains.append({"kills": [asdict(each) for each in done], "lost": lost, "apart": apart})
        landed += len(done)
        assert len(chains) < 10 * kills, "hardly any kill met a living process"
    return {"files": len(expected), "seconds": round(seconds, 2), "chains": chains}


BROKEN = """
import runpy, sys
sys.path[0:0] = [{root!r}, {root!r} + "/kernels"]
from speed_engine.engines import shards
whole = shards.Shards.read
def broken(self, key, part):
    values = whole(self, key, part)
    if key == "exp_avg" and values.numel():
        values.view(-1).view(__import__("torch").int32)[0] ^= 1
    return values
shards.Shards.read = broken
sys.argv[0] = {train!r}
runpy.run_path({train!r}, run_name="__main__")
"""


def control(launcher: Launcher, case: str) -> list[str]:
    """Names of what differs when a restore loses one bit of a moment: empty would mean that the sweep sees nothing."""
    settings, world = CASES[case]
    run = launcher.folder / "control" / "run"
    program = launcher.folder / "broken_restore.py"
    program.write_text(BROKEN.format(root=str(TRAIN.parents[1]), train=str(TRAIN)))
    words = [*COMMON, *settings]
    launcher.train("control/run", *words, f"train.steps={STEPS // 2}", world=world)
    launcher.wait(launcher.start(world, launcher.arguments("control/run", *words), program=program))
    whole = fingerprints(launcher.folder / "whole" / "run")
    return after_the_half(differences(whole, fingerprints(run)))


def after_the_half(names: list[str]) -> list[str]:
    """Of these, what was written after the restore: before it, the files tell of a shorter run."""
    early = {f"step-{step:08d}" for step in range(STEPS // 2 + 1)}
    return [name for name in names if not early & set(name.split("/"))]


@contextlib.contextmanager
def cleared(folder: Path) -> Iterator[Path]:
    """The folder, empty before and gone afterwards."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
