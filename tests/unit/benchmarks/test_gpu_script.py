"""`benchmarks/gpu.sh`, rehearsed on the CPU: every step of a slice from the gate's outcome to the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gate import gpu as gate

SCRIPT = Path(gate.__file__).parents[1] / "gpu.sh"
OPS = ("noise", "loss", "adamw_ema", "gate_residual_norm_modulate", "bias_gelu", "attention")


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def run(*arguments: str, red: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """The script after a gate less than an hour ago, with the op `red`."""
        outcomes = [
            {"op": op, "check": f"{op} check", "status": "red" if op == red else "green",
             "detail": "off by 7", "seconds": 1.0}
            for op in OPS
        ]  # fmt: skip
        cache = tmp_path / "gate"
        cache.mkdir(exist_ok=True)
        kept = cache / f"gate-{gate.identity(torch.device('cpu'))}.json"
        kept.write_text(json.dumps({"gate": outcomes, "conditions": {"cpu": "one"}}))
        # pytest-benchmark measures nothing in a process that takes itself for a worker of pytest-xdist.
        around = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        settings = {"DEVICE": "cpu", "PYTHON": sys.executable, "GATE_CACHE": str(cache)}
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            capture_output=True,
            text=True,
            env={**around, **settings, **environment},
            timeout=280,
        )

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["rows"]


def test_an_unknown_slice_is_refused_with_the_list(run: Any) -> None:
    answer = run("everything")
    assert answer.returncode == 2 and "tests|xl2-b32|xl2-b256|adaln" in answer.stderr


@pytest.mark.slow
def test_a_red_op_is_left_out_and_the_others_are_measured(run: Any, tmp_path: Path) -> None:
    """The page has rows of GELU and attention, and says why there is none of the norm. A rival that takes too long
    costs its own row only."""
    answer = run("adaln", str(tmp_path / "out"), "me", red="gate_residual_norm_modulate",
                 BENCH_RIVAL_SECONDS="0.001")  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "red, and left out of what is measured: gate_residual_norm_modulate" in answer.stdout
    found = rows(tmp_path / "out")
    assert {row["op"] for row in found} == {"bias_gelu", "attention"}
    assert "compile" not in {row["provider"] for row in found}
    mine = [row for row in found if (row["op"], row["provider"]) == ("bias_gelu", "ours")]
    assert mine and all("BENCH_RIVAL_SECONDS" in row["not_measured"]["compile"] for row in mine)
    (page,) = (tmp_path / "out").glob("*.md")
    assert "gate_residual_norm_modulate: its correctness gate is red" in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "op", "settings"),
    [
        ("s2", "train_step", ""),
        ("xl2-b256", "train_step", "model.recompute=selective"),
        ("adamw", "adamw_ema", ""),
        ("diffusion", "diffusion_step", ""),
        ("group-norm", "group_norm_silu", ""),
    ],
)
def test_every_other_slice_comes_to_its_page(
    run: Any, tmp_path: Path, name: str, op: str, settings: str
) -> None:
    """With our rows measured. No rival is compiled, which would take minutes."""
    given = {"BENCH_COMPILE_SECONDS": "0", "BENCH_OURS_TORCH": settings}
    if op != "train_step":
        given["BENCH_RIVAL_SECONDS"] = "0.001"
    answer = run(name, str(tmp_path / "out"), "me", **given)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = rows(tmp_path / "out")
    assert {row["op"] for row in found} == {op}
    ours = [row for row in found if row["provider"].startswith("ours")]
    assert ours and all(row["median_s"] > 0 for row in ours)
    assert not settings or any(row.get("overrides") == settings for row in ours)
    (page,) = (tmp_path / "out").glob("*.md")
    assert page.name.startswith(f"quick-{name}_")
