"""Two thousand steps with saves among them: neither memory nor open files may grow once the first hundreds are done."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.distributed.conftest import Launcher
from tests.distributed.test_training import metrics

STEPS, SETTLED = 2000, 500
ALLOWED = 0.03  # of the memory at step SETTLED: the allocator's own
COMMON = (
    f"train.steps={STEPS}",
    "checkpoint.every=100",
    "checkpoint.keep=2",
    "log.every=20",
    "model.depth=1",
)
ENGINES = {"torch": ("engine=torch",), "zero1": ("engine.zero=1",)}


def sweep(launcher: Launcher, name: str) -> dict[str, Any]:
    """Resident memory [bytes] and open files of one process over its steps, and what is wrong with them."""
    run = launcher.folder / f"growth-{name}"
    (process,) = launcher.start(1, launcher.arguments(run.name, *COMMON, *ENGINES[name]))
    seen: list[dict[str, int]] = []
    while process.poll() is None:
        step = int(metrics(run)[-1]["step"]) if _begun(run) else 0
        if step and (not seen or step > seen[-1]["step"]):
            try:
                files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            except OSError:
                break
            seen.append({"step": step, "memory": pages * 4096, "files": files})
        time.sleep(0.05)
    launcher.wait([process])
    later = [each for each in seen if SETTLED <= each["step"] < STEPS]
    assert len(later) > 4, "the run was over before it could be looked at"
    # Between saves and their threads the numbers go up and down: lows of the two ends are compared.
    half = len(later) // 2
    wrong = []
    for what, allowed in (("memory", ALLOWED), ("files", 0.0)):
        first, last = (min(each[what] for each in part) for part in (later[:half], later[half:]))
        if last > first * (1 + allowed):
            wrong.append(f"{what} grew from {first} to {last}")
    return {"first": later[0], "last": later[-1], "looks": len(seen), "wrong": wrong}


def _begun(run: Path) -> bool:
    journal = run / "metrics.jsonl"
    return journal.exists() and b"\n" in journal.read_bytes()
