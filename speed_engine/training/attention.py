"""Which implementation of attention a run uses: agreed on by all processes, and kept over a resume."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from speed_kernels.attention.op import BACKENDS
from speed_kernels.contract import BackendError, Choice

from speed_engine.distributed import Processes

AS_BEFORE = "as before the interruption: "


def agree_on_attention(model: Any, processes: Processes) -> None:
    """All processes use what the first one measured to be fastest. Collective."""
    choice: Choice | None = getattr(model, "attention_choice", None)
    if choice is None:  # a network without attention
        return
    words = list(BACKENDS)
    mine = float(words.index(choice.backend)) if processes.first else 0.0
    word = words[int(processes.sum(torch.tensor(mine, dtype=torch.float64)).item())]
    if word != choice.backend:
        model.attend_by(word)


def keep_attention(
    model: Any, processes: Processes, before: dict[str, Any], now: dict[str, Any]
) -> str | None:
    """Attend as before the interruption: a second measurement may prefer another kernel, with other last bits.

    before, now: the manifests of the checkpoint and of this run. Another device, or a kernel that was asked for by
    name, changes nothing. Collective. Returns one sentence where the earlier kernel cannot run any more.
    """
    earlier: dict[str, Any] | None = before.get("attention")
    chosen: Choice | None = getattr(model, "attention_choice", None)
    if earlier is None or chosen is None or chosen.backend == earlier["backend"]:
        return None
    if now["config"]["model"]["attention"] != "auto" or before.get("device") != now["device"]:
        return None
    word, why_not = earlier["backend"], None
    try:
        model.attend_by(word)
    except BackendError as error:
        why_not = str(error)
    if processes.any(why_not is not None):
        model.attend_by(chosen.backend)
        model.attention_choice = chosen
        return (
            f"attention was computed by {word} before, and is by {chosen.backend} from here on: "
            f"{why_not or 'another process cannot'}"
        )
    reason = AS_BEFORE + earlier["reason"].removeprefix(AS_BEFORE)
    model.attention_choice = dataclasses.replace(model.attention_choice, reason=reason)
    return None


def attention_facts(model: Any) -> dict[str, Any] | None:
    """Which implementation of attention runs and why; None for a network without attention."""
    choice: Choice | None = getattr(model, "attention_choice", None)
    return None if choice is None else dataclasses.asdict(choice)
