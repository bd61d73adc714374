"""`make test-faults`: kills and damage by the dozen, minutes on two cores, written down as JSON and as a page.

python -m tests.sweeps --out benchmarks/results --name HOST [--kills 6] [--only kills damage growth nodes methods]
What a file of that name holds already, from the same commit and seed, is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import conditions
from speed_engine.atomic_files import write_json, write_text
from tests.distributed.conftest import Launcher
from tests.distributed.warm import Nest
from tests.sweeps import damage, growth, kills, methods, nodes
from tests.sweeps.page import failures, page


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.sweeps", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="where the two go")
    parser.add_argument("--name", default="here", help="of the machine, in the files' names")
    parser.add_argument("--kills", type=int, default=6, help="of each of the eight cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"faults_{asked.name}.json"
    where = {"seed": asked.seed, **conditions(torch.device("cpu"))}
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if told.get("conditions") != where:
        told = {"conditions": where}
    nest = Nest()
    try:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            launcher = Launcher(nest, Path(folder), Path(folder) / "data")
            for part in asked.only:
                for name, do in PARTS[part](launcher, asked).items():
                    if name not in told.setdefault(part, {}):
                        print(f"{part}: {name}", file=sys.stderr, flush=True)
                        told[part][name] = do()
                        write_json(path, told)
    finally:
        nest.close()
    write_text(path.with_suffix(".md"), page(told))
    for sentence in failures(told):
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if failures(told) else 0


def _kills(launcher: Launcher, asked: argparse.Namespace) -> dict[str, Any]:
    def of(case: str) -> dict[str, Any]:
        inner = Launcher(launcher.nest, launcher.folder / case, launcher.data)
        with kills.cleared(inner.folder):
            found = kills.sweep(inner, case, asked.kills, asked.seed)
            if case in CONTROLLED:
                found["control"] = kills.control(inner, case)
        return found

    return {case: (lambda case=case: of(case)) for case in kills.CASES}


CONTROLLED = ("zero1-2", "torch-1")  # an engine each


def _damage(launcher: Launcher, asked: argparse.Namespace) -> dict[str, Any]:
    run = launcher.folder / "damaged"
    settings = [*kills.COMMON, "engine.zero=1", "train.steps=6"]

    def files() -> dict[str, Any]:
        launcher.train(run.name, *settings, world=2)
        return damage.sweep(run, launcher.folder, asked.seed)

    def unchecked() -> int:
        launcher.train(run.name, *settings, world=2)
        return damage.control(run, asked.seed)

    return {"files": files, "control": unchecked}


def _nodes(launcher: Launcher, asked: argparse.Namespace) -> dict[str, Any]:
    if reason := nodes.why_not():
        print(f"nodes: left out, {reason}", file=sys.stderr)
        return {}

    def of(name: str) -> dict[str, Any]:
        return nodes.case(launcher, name, nodes.undisturbed(launcher, nodes.CASES[name][1]))

    return {name: (lambda name=name: of(name)) for name in nodes.CASES}


def _growth(launcher: Launcher, asked: argparse.Namespace) -> dict[str, Any]:
    return {name: (lambda name=name: growth.sweep(launcher, name)) for name in growth.ENGINES}


def _methods(launcher: Launcher, asked: argparse.Namespace) -> dict[str, Any]:
    def of(kind: str) -> dict[str, Any]:
        with kills.cleared(launcher.folder / kind) as folder:
            return methods.sweep(Launcher(launcher.nest, folder, launcher.data), kind)

    return {kind: (lambda kind=kind: of(kind)) for kind in methods.METHODS}


PARTS = {
    "kills": _kills,
    "damage": _damage,
    "growth": _growth,
    "nodes": _nodes,
    "methods": _methods,
}

if __name__ == "__main__":
    sys.exit(main())
