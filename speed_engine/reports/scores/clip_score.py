"""How well pictures fit their prompts: the mean cosine of a CLIP's vectors of picture and prompt (Hessel et al., arXiv
2104.08718, without its factor of 2.5, as tables of text-to-image give it)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speed_engine.atomic_files import write_json
from speed_engine.conditions.clip import Likeness
from speed_engine.reports.scores import sets


def clip_score(
    samples: str | Path,
    clip: str,
    prompts: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Judge the pictures of `samples`, the i-th by prompt i modulo their number; the report as JSON is `out` (default:
    clip_score.json in a folder of `sample`, else clip_score-NAME.json here).

    clip: folder or hub name of a whole CLIP. prompts: None for those that the folder of `sample` was drawn with. Raises
    ValueError.
    """
    pictures = sets.open_pictures(samples)
    recipe = pictures.told.get("recipe") or {}
    said = prompts or (recipe.get("source") or {}).get("prompts")
    if not said:
        raise ValueError(
            f"{samples} does not say its prompts; give --prompts FILE, a prompt a line"
        )
    judge = Likeness(clip, device)
    found, first = [], 0
    for pixels in pictures.batches(batch_size):
        texts = [said[(first + i) % len(said)] for i in range(len(pixels))]
        found.append(judge.cosines(pixels, texts))
        first += len(pixels)
    cosine_N = np.concatenate(found)
    error = float(cosine_N.std(ddof=1)) / math.sqrt(len(cosine_N)) if len(cosine_N) > 1 else None
    report = {
        "kind": "clip",
        "clip_score": float(cosine_N.mean()),
        "standard_error": error,
        "num_samples": len(cosine_N),
        "num_prompts": len(said),
        "clip": judge.identity,
        "samples": str(samples),
    }
    if out is None:
        own = pictures.told.get("kind") == "samples"
        out = (
            Path(samples) / "clip_score.json"
            if own
            else Path(f"clip_score-{Path(samples).stem}.json")
        )
    write_json(out, report)
    return {**report, "file": str(out)}


def line(report: dict[str, Any]) -> str:
    """For people."""
    error = report["standard_error"]
    return (
        f"CLIP score   {report['clip_score']:.4f}{f' ± {error:.2g}' if error is not None else ''} "
        f"({report['num_samples']:,} pictures, {report['num_prompts']:,} prompts, {report['clip']}); {report['file']}"
    )
