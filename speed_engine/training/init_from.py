"""`train.init_from`: a run that starts from the weights of another one, or of a published network.

What fits by name and shape is taken. A table of other classes, a projection of other channels, a condition that is new
stay as they were initialised; a position embedding is of the new resolution already.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from speed_engine.training import checkpoint
from speed_engine.weights import file as weights_file
from speed_engine.weights import source

LEAST = 0.5  # share of the network's numbers that must be found, or it is another network


@torch.no_grad()
def initialise(
    model: nn.Module, path: Path, which: Literal["ema", "model"], trusted: Collection[str] = ()
) -> dict[str, Any]:
    """Fill `model` from `path`: a run folder (its weights `which`), or whatever `weights.source` reads.

    Returns what was done, for the manifest: the file's name and checksum, the tensors taken (a count), made new (by
    name) and left out (by name). Raises ValueError for weights of another architecture or size.
    """
    found = source.read(_of_run(path, which) or path, trusted)
    theirs, own = found.model.state_dict(), model.state_dict()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    theirs_is, own_is = found.model.config.kind, getattr(model, "config").kind  # noqa: B009
    fits = [name for name in own if name in theirs and own[name].shape == theirs[name].shape]
    taken = [name for name in fits if name in trained]
    new = sorted(trained - set(taken))
    share = sum(own[name].numel() for name in taken) / sum(own[name].numel() for name in trained)
    if theirs_is != own_is or share < LEAST:
        what = f"a {theirs_is}, and the model is a {own_is}"
        if theirs_is == own_is:
            what = f"a network of which {share:.0%} fits ({', '.join(new[:3])} ... do not)"
        raise ValueError(
            f"train.init_from={path} holds {what}; set model.* as those weights have it"
        )
    for name in taken:
        if not torch.isfinite(theirs[name]).all():
            raise ValueError(f"train.init_from={path} has NaN or infinite weights in {name}")
        own[name].copy_(theirs[name])
    return {
        "file": path.name,
        "checksum": weights_file.checksum({}, theirs),
        "remarks": list(found.remarks),
        "taken": len(taken),
        "new": new,
        "left_out": sorted(set(theirs) - set(own)),
    }


def sentences(done: dict[str, Any]) -> list[str]:
    """What `initialise` did, for a person."""
    lines = [f"weights of {done['file']}: {done['taken']} tensors taken"]
    lines += [f"  {remark}" for remark in done["remarks"]]
    lines += [f"  made new: {', '.join(done['new'])}"] if done["new"] else []
    lines += [f"  left out: {', '.join(done['left_out'])}"] if done["left_out"] else []
    return lines


def _of_run(path: Path, which: str) -> Path | None:
    """The weights file of a run folder's newest checkpoint; None for what is no run folder."""
    if not (path / "manifest.json").exists():
        return None
    found = checkpoint.newest(path, lambda text: None)
    if found is None:
        raise ValueError(f"train.init_from={path} is a run folder without a checkpoint")
    return found.folder / f"{which}.safetensors"
