"""Which rows a red correctness gate takes out of a report. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a benchmark measures -> the ops in it.
OF_A_STEP = ("noise", "loss")
RESTS_ON = {
    "diffusion_step": OF_A_STEP,
    "train_step": (
        *OF_A_STEP,
        "adamw_ema",
        "gate_residual_norm_modulate",
        "bias_gelu",
        "attention",
    ),
}


def red_ops(gate: Mapping[str, Any]) -> dict[str, list[str]]:
    """op -> what the gate found wrong with it, one text a check."""
    found: dict[str, list[str]] = {}
    for each in gate["gate"]:
        if each["status"] == "red":
            found.setdefault(each["op"], []).append(f"{each['check']}: {each['detail']}")
    return found


def needs(row: Mapping[str, Any]) -> set[str]:
    """The ops whose kernels a row of ours rests on."""
    return set(RESTS_ON.get(row["op"], (row["op"],)))
