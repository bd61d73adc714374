"""Which implementation of attention a run uses: agreed on by all processes, and kept over a resume."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, cast

import torch
from speed_kernels.attention.op import BACKENDS
from speed_kernels.contract import BackendError, Choice
from torch import nn

from speed_engine.distributed import Processes

AS_BEFORE = "as before the interruption: "


class Attends(Protocol):
    """A network whose attention can be computed by several kernels."""

    attention_choice: Choice

    def attend_by(self, word: str) -> None:
        """Use another one from now on. Raises BackendError."""
        ...


def attending(model: nn.Module) -> Attends | None:
    """The network, if it has such an attention."""
    return cast("Attends", model) if hasattr(model, "attention_choice") else None


def agree_on_attention(model: nn.Module, processes: Processes) -> None:
    """All processes use what the first one measured to be fastest. Collective.

    Raises BackendError on all of them where it cannot run on one.
    """
    attends = attending(model)
    if attends is None:
        return
    choice = attends.attention_choice
    words = list(BACKENDS)
    mine = float(words.index(choice.backend)) if processes.first else 0.0
    word = words[int(processes.sum(torch.tensor(mine, dtype=torch.float64)).item())]
    why_not = None
    try:
        if word != choice.backend:
            attends.attend_by(word)
    except BackendError as error:
        why_not = str(error)
    if processes.any(why_not is not None):
        raise BackendError(
            f"the first process chose attention by {word}, and {why_not or 'another process cannot'}; set "
            "model.attention to one that all have"
        )


def keep_attention(
    model: nn.Module, processes: Processes, before: dict[str, Any], now: dict[str, Any]
) -> str | None:
    """Attend as before the interruption: a second measurement may prefer another kernel, with other last bits.

    before, now: the manifests of the checkpoint and of this run. Another device, or a kernel that was asked for by
    name, changes nothing. Collective. Returns one sentence where the earlier kernel cannot run any more.
    """
    earlier: dict[str, Any] | None = before.get("attention")
    attends = attending(model)
    if earlier is None or attends is None:
        return None
    chosen = attends.attention_choice
    if chosen.backend == earlier["backend"]:
        return None
    if now["config"]["model"]["attention"] != "auto" or before.get("device") != now["device"]:
        return None
    word, why_not = earlier["backend"], None
    try:
        attends.attend_by(word)
    except BackendError as error:
        why_not = str(error)
    if processes.any(why_not is not None):
        attends.attend_by(chosen.backend)
        attends.attention_choice = chosen
        return (
            f"attention was computed by {word} before, and is by {chosen.backend} from here on: "
            f"{why_not or 'another process cannot'}"
        )
    reason = AS_BEFORE + earlier["reason"].removeprefix(AS_BEFORE)
    attends.attention_choice = dataclasses.replace(attends.attention_choice, reason=reason)
    return None


def attention_facts(model: nn.Module) -> dict[str, Any] | None:
    """Which implementation of attention runs and why; None for a network without attention."""
    attends = attending(model)
    return None if attends is None else dataclasses.asdict(attends.attention_choice)
