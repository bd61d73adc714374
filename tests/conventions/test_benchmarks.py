"""Benchmarks: nobody's foundation, and no two of their files import each other."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.glob("benchmarks/**/*.py")
}


def imported(path: Path) -> set[str]:
    """Modules of benchmarks that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: benchmarks import by full names"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] == "benchmarks"}


def test_no_circle() -> None:
    left = {name: imported(path) & FILES.keys() - {name} for name, path in FILES.items()}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, f"these import each other: {sorted(left)}"


def test_the_project_does_not_stand_on_its_benchmarks() -> None:
    code = [*ROOT.glob("speed_engine/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    assert not [path for path in code if imported_from_engine(path)]


def imported_from_engine(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    froms = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    plain = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    return any(name.split(".")[0] == "benchmarks" for name in (*froms, *plain))
