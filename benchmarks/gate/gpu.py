"""The gate before any GPU measurement: `python -m benchmarks.gate.gpu --json FILE`; exit code 1 if nothing is green.

Runs every check of `numerics` and `network` and, on CUDA, of `device`, prints one line each, and writes them as JSON
for the report, which leaves out the rows of an op that is red. `--reuse FOLDER` keeps the outcomes there, and takes
those of the same code on the same device if they are less than an hour old. With `--device cpu` it checks the C++
kernels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import device as gate_device
from benchmarks.gate import network as gate_network
from benchmarks.gate import numerics as gate_numerics
from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import GateError

ROOT = Path(__file__).parents[2]
FRESH = 3600.0  # seconds
Check = Callable[[torch.device, str], str]

NUMERICS: tuple[tuple[str, Check], ...] = (
    ("noise", gate_numerics.noise),
    ("noise", gate_numerics.normals),
    ("noise", gate_numerics.batch_split),
    ("loss", gate_numerics.loss),
    ("adamw_ema", gate_numerics.adamw_ema),
    ("gate_residual_norm_modulate", gate_network.gated_norm),
    ("bias_gelu", gate_network.gelu),
    ("attention", gate_network.attention),
    ("group_norm_silu", gate_network.group_norm),
)
DEVICE: tuple[tuple[str, Check], ...] = (
    ("loss", gate_device.nothing_waits),
    ("loss", gate_device.graphs),
    ("loss", gate_device.many_samples),
    ("noise", gate_device.one_wide_sample),
    ("adamw_ema", gate_device.wide_update),
)


def run(device: torch.device, checks: tuple[tuple[str, Check], ...]) -> list[dict[str, Any]]:
    """The outcome of every check: op, name, status (green, red, skipped), detail, seconds."""
    outcomes = []
    for op, check in checks:
        begin = time.perf_counter()
        try:
            backend = "" if op == "attention" else gate_numerics.available(op, device)
            detail = check(device, backend)
            status = "skipped" if detail.startswith("skipped") else "green"
        except GateError as error:
            status, detail = "red", str(error)
        except (
            Exception
        ) as error:  # a kernel that does not even run is red, and the others still get their line
            status, detail = "red", f"{type(error).__name__}: {str(error).splitlines()[0]}"
        seconds = round(time.perf_counter() - begin, 1)
        name = check.__name__
        print(f"{status:8}{name:16}{seconds:6.1f} s  {detail}", flush=True)
        outcome = {"op": op, "check": name, "status": status, "detail": detail}
        outcomes.append({**outcome, "seconds": seconds})
    return outcomes


def identity(device: torch.device) -> str:
    """Tells code and device apart: what is compiled, what checks it, the versions and the GPU."""
    digest = hashlib.sha256()
    folders = (ROOT / "kernels", ROOT / "csrc", ROOT / "benchmarks" / "gate")
    for path in sorted(p for folder in folders for p in folder.rglob("*") if p.is_file()):
        if "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    digest.update(f"{name} {torch.__version__} {torch.version.cuda}".encode())
    return digest.hexdigest()[:16]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="correctness gate of all kernels on a device")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    parser.add_argument("--reuse", type=Path, help="folder of outcomes, to be taken for an hour")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("red: no CUDA device is visible")
        return 1
    device = torch.device(options.device)
    checks = NUMERICS + (DEVICE if device.type == "cuda" else ())
    kept = options.reuse / f"gate-{identity(device)}.json" if options.reuse else None
    if kept is not None and kept.exists() and time.time() - kept.stat().st_mtime < FRESH:
        text = kept.read_text()
        outcomes = json.loads(text)["gate"]
        for each in outcomes:
            print(f"{each['status']:8}{each['check']:16}  {each['detail']} (less than an hour ago)")
    else:
        outcomes = run(device, checks)
        result = {"gate": outcomes, "conditions": conditions(device)}
        text = json.dumps(result, indent=1) + "\n"
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(text)
    if options.json:
        options.json.write_text(text)
    red = dict.fromkeys(each["op"] for each in outcomes if each["status"] == "red")
    if red:
        print(f"red, and left out of what is measured: {', '.join(red)}")
    return int(not any(each["status"] == "green" for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
