"""What the README promises of our rows, and whether a run keeps it. Needs nothing but Python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """What the README promises of a column of our row, on the cases whose name matches."""

    op: str
    device: str
    case: str  # regular expression
    column: str
    must: float | None
    goal: float | None
    smaller: bool = False  # whether small is good
    provider: str = "ours"
    where: tuple[str, str] | None = (
        None  # a column and what it must match: an absolute number has its GPU
    )


GLUE = "gate_residual_norm_modulate"
H200, AMX, NO_AMX = ("gpu", "H200"), ("amx", "True"), ("amx", "False")
TARGETS = (
    Target("diffusion_step", "cuda", "latents32", "ratio_vs_reference", 20, 30),
    Target("diffusion_step", "cuda", "latents32", "launches", 2, 2, smaller=True),
    Target("diffusion_step", "cuda", ".", "host_syncs", 0, 0, smaller=True),
    Target("diffusion_step", "cuda", "latents32-b256", "gpu_ratio_vs_compile", None, 2),
    Target("diffusion_step", "cuda", "latents32-b256", "gpu_time_s", None, 25e-6, smaller=True),
    Target("diffusion_step", "cuda", "pixels256", "gpu_ratio_vs_compile", None, 2.5),
    Target("diffusion_step", "cuda", "pixels256", "floor_fraction_gpu", None, 0.75),
    Target("diffusion_step", "cpu", ".", "ratio_vs_reference", 3, 6),
    Target("adamw_ema", "cuda", ".", "floor_fraction_gpu", 0.77, 0.87),
    Target("adamw_ema", "cuda", ".", "ratio_vs_reference", None, 2.5),
    Target("adamw_ema", "cuda", "(list|flat)$", "ratio_vs_eager", None, 1.15),
    Target("adamw_ema", "cuda", "mixed", "ratio_vs_eager", None, 1.3),
    Target("adamw_ema", "cpu", "(list|flat)$", "ratio_vs_reference", 5, None),
    Target("latent_shards", "cpu", ".", "samples_per_s", 60e3, 120e3),
    Target("latent_shards", "cpu", ".", "ratio_vs_webdataset_raw", 7, 14),
    Target("latent_shards", "cpu", ".", "ratio_vs_webdataset_decode", None, 20),
    Target(GLUE, "cuda", "forward", "floor_fraction_gpu", 0.8, 0.88),
    Target(GLUE, "cuda", "backward", "floor_fraction_gpu", 0.65, 0.78),
    Target(GLUE, "cuda", ".", "gpu_ratio_vs_eager", None, 4),
    Target(GLUE, "cuda", "forward", "gpu_ratio_vs_compile", None, 1),
    Target(GLUE, "cuda", "backward", "gpu_ratio_vs_compile", None, 1.3),
    *(
        Target("train_step", "cuda", case, column, must, goal, provider="ours-torch")
        for case, column, must, goal in (
            ("XL2-b256", "ratio_vs_reference", 2, 2.3),
            ("XL2-b256", "ratio_vs_eager", 1.3, 1.4),
            ("XL2-b256", "ratio_vs_compile", 1.05, 1.09),
            ("XL2-b32", "ratio_vs_eager", 1.4, 1.55),
            ("XL2-b32", "ratio_vs_compile", 1.12, 1.18),
            ("S2-b32", "ratio_vs_eager", 2, 3),
            ("S2-b32", "ratio_vs_compile", None, 1.3),
        )
    ),
    Target("train_step", "cuda", "XL2-b256", "images_per_s", 640, 740, False, "ours-torch", H200),
    Target("train_step", "cuda", "XL2-b32", "images_per_s", 500, 570, False, "ours-torch", H200),
    Target("train_step", "cuda", "XL2-b256", "peak_memory_bytes", 95e9, 70e9, True, "ours-torch"),
    Target("train_step", "cuda", ".", "ratio_vs_ours_torch", 0.87, 0.95, False, "ours-deepspeed"),
    Target("train_step", "cpu", "S2", "ratio_vs_reference", 2.3, 3, False, "ours-torch", AMX),
    Target("train_step", "cpu", "XL2", "ratio_vs_reference", 2.7, 3.5, False, "ours-torch", AMX),
    Target("train_step", "cpu", ".", "ratio_vs_reference", 1.05, 1.15, False, "ours-torch", NO_AMX),
    Target("train_step", "cpu", ".", "ratio_vs_ours_torch", 0.87, 0.95, False, "ours-deepspeed"),
    Target("train_step_unet", "cpu", ".", "ratio_vs_eager_bf16", 1.2, None),
    Target("train_step_unet", "cpu", ".", "ratio_vs_eager", 1.2, None),
)


def verdicts(rows: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, str]]:
    """One line for each target of `device` and case; `not measured` where no row has the column."""
    lines = []
    for target in TARGETS:
        if target.device != device:
            continue
        ours = [row for row in rows if applies(target, row)]
        line = {
            "what": f"{target.op}: {target.column}",
            "must": number(target.must),
            "goal": number(target.goal),
        }
        same = [row for row in rows if row["op"] == target.op]
        if not ours and target.where is not None and same:
            continue  # another machine's target
        if not ours:
            lines.append(line | {"case": "-", "measured": "-", "verdict": "not measured"})
        for row in ours:
            value = row.get(target.column)
            verdict = "not measured" if value is None else _verdict(target, float(value))
            measured = number(value)
            lines.append(line | {"case": case_of(row), "measured": measured, "verdict": verdict})
    return lines


def applies(target: Target, row: Mapping[str, Any]) -> bool:
    """Whether the target is about this row."""
    if row["op"] != target.op or row["provider"] != target.provider:
        return False
    if target.where is not None:
        column, pattern = target.where
        if not re.search(pattern, str(row.get(column, ""))):
            return False
    return re.search(target.case, row["case"]) is not None


def case_of(row: Mapping[str, Any]) -> str:
    """The case, with the provider's name where there are more of ours than one."""
    provider = row["provider"]
    return row["case"] + ("" if provider == "ours" else f" {provider}")


def _verdict(target: Target, value: float) -> str:
    def reached(limit: float | None) -> bool:
        return limit is not None and (value <= limit if target.smaller else value >= limit)

    if reached(target.goal):
        return "goal reached"
    if target.must is None:
        return "goal missed"
    return "reached" if reached(target.must) else "MISSED"


def number(value: float | None) -> str:
    """Three digits, or all before the point."""
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
