"""The gate before any GPU measurement: `python -m benchmarks.gate.gpu --json FILE`; exit code 1 if anything is red.

Runs every check of gate_numerics and, on CUDA, of gate_device, prints one line each, and writes them as JSON for the
report. With `--device cpu` it checks the C++ kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import device as gate_device
from benchmarks.gate import numerics as gate_numerics
from benchmarks.harness.environment import conditions
from benchmarks.harness.measure import GateError

Check = Callable[[torch.device, str], str]

NUMERICS: tuple[tuple[str, Check], ...] = (
    ("noise", gate_numerics.noise),
    ("noise", gate_numerics.normals),
    ("noise", gate_numerics.batch_split),
    ("loss", gate_numerics.loss),
    ("adamw_ema", gate_numerics.adamw_ema),
)
DEVICE: tuple[tuple[str, Check], ...] = (
    ("loss", gate_device.nothing_waits),
    ("loss", gate_device.graphs),
    ("loss", gate_device.many_samples),
    ("noise", gate_device.one_wide_sample),
    ("adamw_ema", gate_device.wide_update),
)


def run(device: torch.device, checks: tuple[tuple[str, Check], ...]) -> list[dict[str, Any]]:
    """The outcome of every check: name, status (green, red, skipped), detail, seconds."""
    outcomes = []
    for op, check in checks:
        begin = time.perf_counter()
        try:
            detail = check(device, gate_numerics.available(op, device))
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
        outcomes.append({"check": name, "status": status, "detail": detail, "seconds": seconds})
    return outcomes


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="correctness gate of all kernels on a device")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("red: no CUDA device is visible")
        return 1
    device = torch.device(options.device)
    checks = NUMERICS + (DEVICE if device.type == "cuda" else ())
    outcomes = run(device, checks)
    if options.json:
        result = {"gate": outcomes, "conditions": conditions(device)}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(outcome["status"] == "red" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
