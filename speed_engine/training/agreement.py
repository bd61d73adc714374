"""What all processes must see alike before they train: the run folder, and the checkpoint they go on from.

The first process decides and tells; the others check that they see the same, which a disk of each node's own breaks.
One process speaks (`ToldElsewhere` keeps the others quiet), and all end with the same code.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import torch

from speed_engine.distributed import Processes
from speed_engine.errors import ToldElsewhere
from speed_engine.training import checkpoint

T = TypeVar("T")
SEEN_WITHIN = 5.0  # seconds after which a network disk shows what another node wrote


def hold(run: Path, processes: Processes) -> IO[str] | None:
    """Make the run folder and hold it for this run; the file to close at the end, on the first process. Collective.

    Raises ValueError or OSError on the first process if another run holds the folder, it cannot be made, or a process
    does not see it; ToldElsewhere on the others.
    """
    held: IO[str] | None = None
    failure: Exception | None = None
    holder = ""
    if processes.first:
        try:
            run.mkdir(parents=True, exist_ok=True)
            held = checkpoint.lock(run)
            holder = (run / "lock").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            failure = error
    holder = _told(processes, failure, holder)
    _all_see(processes, run / "lock", lambda text: text == holder.encode(), run)
    return held


def still_held(there: bool, run: Path, step: int, processes: Processes) -> None:
    """Raise as `hold` does, on all processes, if the run folder is not `there` on one any more. Collective."""
    if processes.any(not there):
        words = f"the run folder {run} was removed while its run was at step {step}, which is lost; start again"
        raise checkpoint.CheckpointError(words) if processes.first else ToldElsewhere(words)


def newest(run: Path, processes: Processes, warn: Callable[[str], None]) -> checkpoint.Found | None:
    """`checkpoint.newest` of the first process, on all of them. Collective; raises as `hold` does."""
    return chosen(run, processes, lambda: checkpoint.newest(run, warn))


def chosen(
    run: Path, processes: Processes, choose: Callable[[], checkpoint.Found | None]
) -> checkpoint.Found | None:
    """The checkpoint that the first process chooses, on all of them. Collective; raises as `hold` does."""
    failure: Exception | None = None
    told = None
    if processes.first:
        try:
            found = choose()
            if found is not None:
                told = (found.step, str(found.folder), found.manifest, _crc_of_manifest(found))
        except (OSError, ValueError) as error:
            failure = error
    told = _told(processes, failure, told)
    if told is None:
        return None
    step, folder, manifest, crc = told
    path = Path(folder) / checkpoint.MANIFEST
    _all_see(processes, path, lambda text: zlib.crc32(text) == crc, run)
    return checkpoint.Found(step, Path(folder), manifest)


def _crc_of_manifest(found: checkpoint.Found) -> int:
    return zlib.crc32((found.folder / checkpoint.MANIFEST).read_bytes())


def _told(processes: Processes, failure: Exception | None, value: T) -> T:
    """The first process's value, or its failure: raised there, and as ToldElsewhere on the others."""
    words, value = processes.told_by_first((failure and str(failure), value))
    if failure is not None:
        raise failure
    if words is not None:
        raise ToldElsewhere(words)
    return value


def _all_see(processes: Processes, path: Path, is_same: Callable[[bytes], bool], run: Path) -> None:
    if processes.world == 1:
        return
    blind = torch.zeros(processes.world)
    blind[processes.rank] = float(not _sees(path, is_same))
    ranks = processes.sum(blind).nonzero().flatten().tolist()
    if not ranks:
        return
    words = (
        f"process{'es' if len(ranks) > 1 else ''} {', '.join(str(rank) for rank in ranks[:8])} of {processes.world} "
        f"cannot see {path} as process 0 does; run_dir must lie on a disk that all nodes share, and {run} does not"
    )
    raise checkpoint.CheckpointError(words) if processes.first else ToldElsewhere(words)


def _sees(path: Path, is_same: Callable[[bytes], bool]) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN
    while True:
        try:
            if is_same(path.read_bytes()):
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
