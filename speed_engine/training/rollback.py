"""Back to the last good checkpoint, without the data that broke the run; and the note of which data that was.

    run/bad_steps.jsonl   {"step": 41, "data_step": 41, "samples": [...]}   one line a refused update

The data of step n are those of `data_step(n)`: the n-th number that is not left out. Everything else of a step (noise,
time, flips) keeps the step's own address. What is left out stands in the manifest of each later checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.atomic_files import write_text
from speed_engine.data import order
from speed_engine.data.split import Part
from speed_engine.distributed import Processes
from speed_engine.training import checkpoint
from speed_engine.training.assembly import Parts

FILE = "bad_steps.jsonl"


def note(parts: Parts, run: Path, bad: Iterable[int], left_out: list[int]) -> None:
    """Append the samples of refused updates to `bad_steps.jsonl`, by their numbers in the whole set.

    Slot i of the step holds samples[i].
    """
    if not parts.processes.first:
        return
    lines = []
    for step in bad:
        batch, num = parts.config.train.global_batch, len(parts.source)
        where = order.data_step(step, left_out)
        slot = np.arange(batch)
        samples = order.sample_indices(parts.config.seed, np.array(where), slot, batch, num)
        if isinstance(parts.source, Part):
            samples = parts.source.whole(samples)
        words: dict[str, Any] = {"step": step, "data_step": where, "samples": samples.tolist()}
        lines.append(json.dumps(words) + "\n")
    if lines:
        with (run / FILE).open("a", encoding="utf-8") as file:
            file.writelines(lines)


def target(
    run: Path, guilty: list[int], processes: Processes, warn: Callable[[str], None]
) -> checkpoint.Found | None:
    """The newest good checkpoint before the first guilty step, or None; later ones are removed. Collective."""

    def choose() -> checkpoint.Found | None:
        folders = [
            p for p in (run / "checkpoints").glob("step-*") if checkpoint.NAME.fullmatch(p.name)
        ]
        for folder in sorted(folders, reverse=True):
            if checkpoint.step_of(folder) > guilty[0]:
                continue
            try:
                found = checkpoint.verified(folder)
            except checkpoint.CheckpointError as error:
                warn(str(error))
                continue
            write_text(run / "checkpoints" / "latest", folder.name)
            for later in folders:
                if checkpoint.step_of(later) > found.step:
                    shutil.rmtree(later)
            return found
        return None

    return checkpoint.agreed(choose, processes)
