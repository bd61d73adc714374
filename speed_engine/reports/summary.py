"""One page on a finished run: what it cost and what came out, printed and written to summary.json."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from speed_engine.atomic_files import write_json
from speed_engine.progress import wrapped
from speed_engine.reports.run_folder import open_run
from speed_engine.training import checkpoint, metrics_file


def run(folder: Path, started: float | None, trusted: Collection[str] = ()) -> int:
    """Write `folder/summary.json` and print it as a short table. `started`: time.time() when the
    whole job began, if it was timed; trusted: see `open_run`. Raises CheckpointError where the folder is no run."""
    facts = gather(folder, started, trusted)
    write_json(folder / "summary.json", facts)
    for name, value in facts.items():
        if value is None:  # not told: no classes, no score
            continue
        if isinstance(value, float):
            value = f"{value:.4g}"
        print(wrapped(f"{name:24} {value}", " " * 25))
    return 0


def gather(folder: Path, started: float | None, trusted: Collection[str] = ()) -> dict[str, Any]:
    """The numbers of a run: from its manifest, its metrics and the scores of its samples."""
    opened = open_run(folder, trusted)
    lines = metrics_file.read(folder / "metrics.jsonl")
    manifest = opened.manifest
    rates = [line["images_per_s"] for line in lines if line.get("images_per_s")]
    facts: dict[str, Any] = {
        "steps": opened.step,
        "images": opened.step * opened.config.train.global_batch,
        "parameters": manifest["parameters"],
        "timesteps": opened.config.timesteps.kind,
        "engine": f"{manifest['engine']}, {manifest['distribution']}",
        "kernels": ", ".join(f"{k['op']} {k['backend']}" for k in manifest["kernels"]),
        "loss": lines[-1].get("loss") if lines else None,
        "images_per_s": statistics.median(rates) if rates else None,
    }
    if (judged := _last(lines, "validation_loss")) is not None:
        facts["validation_loss"] = judged
    score = folder / "samples" / "score.json"
    if score.exists():
        facts |= _score_facts(json.loads(_read(score)))
    if started is not None:
        facts["wall_seconds"] = round(time.time() - started, 1)
    facts["pictures"] = str(folder)
    return facts


def _last(lines: list[dict[str, Any]], key: str) -> float | None:
    """The newest value of a key that only some lines have."""
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def _score_facts(score: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers of a score; each Frechet distance needs its floor beside it."""
    frechet, agreement = score["frechet"], score.get("class_agreement")
    same, floor = frechet.get("same_size"), frechet.get("floor")
    facts = {
        "samples": score["num_samples"],
        "class_agreement": agreement["agreement"] if agreement else None,
        "frechet_distance": same["mean"] if same else frechet["distance"],
    }
    if floor:  # as many real pictures in the samples' place
        facts |= {"frechet_floor": floor["mean"], "frechet_floor_std": floor["std"]}
    if copies := score.get("memorisation"):
        facts["nearest_scan_ratio"] = copies["ratio"]  # below 1: samples copy scans
    return facts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise checkpoint.CheckpointError(f"cannot read {path}: {error.strerror}") from error
