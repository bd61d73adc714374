"""The rules of the house, as far as a program can check them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = [*ROOT.glob("speed_engine/**/*.py"), *ROOT.glob("kernels/**/*.py")]
SOURCES = [
    *CODE,
    *ROOT.glob("tests/**/*.py"),
    *ROOT.glob("benchmarks/**/*.py"),
    *ROOT.glob("csrc/*"),
]

# Which of our own packages a part may import, beside `kinds`. A part is the first rule whose prefix matches.
MAY_IMPORT = {
    "speed_engine.kinds": [],
    "speed_kernels": ["speed_kernels"],
    "speed_engine.schedules": ["speed_engine.schedules"],
    "speed_engine.config": [],
    "speed_engine.data.order": ["speed_kernels.philox", "speed_kernels.noise"],
    "speed_engine.objectives": ["speed_engine.objectives", "speed_engine.schedules"],
    "speed_engine.timesteps": ["speed_engine.timesteps", "speed_engine.schedules"],
    "speed_engine.step_table": [
        "speed_engine.schedules",
        "speed_engine.objectives",
        "speed_engine.timesteps",
        "speed_kernels",
    ],
    "speed_engine.models": ["speed_engine.models", "speed_kernels"],
    "speed_engine.data": [
        "speed_engine.data",
        "speed_engine.distributed",
        "speed_engine.atomic_files",
        "speed_kernels",
    ],
    "speed_engine.engines.optimizer": ["speed_kernels"],
}
# Outside package -> the only files that may import it.
ONLY_IN = {
    "deepspeed": r"speed_engine/engines/deepspeed(_json)?\.py",
    "apex": r"speed_engine/engines/optimizer\.py",
    "webdataset": r"speed_engine/data/storage/\w+\.py",
    "xformers": r"kernels/speed_kernels/attention/xformers_gpu\.py",
    "triton": r"kernels/speed_kernels/(\w+/)?(triton_\w+|ahead_of_time)\.py",
    "diffusers": r"speed_engine/(sampling/\w+|data/encode|weights/\w+)\.py",
    "torchvision": r"never",
    "timm": r"never",
}


def module_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[1:] if relative.parts[0] == "kernels" else relative.parts
    return ".".join(p for p in parts if p != "__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    ours = [i for i in imports_of(path) if within(i, "speed_engine") or within(i, "speed_kernels")]
    module = module_of(path)
    for part, allowed in MAY_IMPORT.items():
        if within(module, part):
            anywhere = ["speed_engine.kinds"] if within(module, "speed_engine") else []
            wrong = [i for i in ours if not any(within(i, a) for a in [*allowed, *anywhere])]
            assert not wrong, f"{module} may import {allowed}, not {wrong}"
            break


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_have_one_home(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for package, home in ONLY_IN.items():
        if any(within(i, package) for i in imports_of(path)):
            assert re.fullmatch(home, name), f"{name} imports {package}; its home is {home}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_every_module_says_what_it_is_for() -> None:
    silent = [p for p in CODE if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert not silent


def test_names() -> None:
    """No grab bags, no name that would shadow another package when a script's folder is on sys.path."""
    banned = {"utils", "helpers", "common", "misc", "manager", "base"}
    assert not [p for p in CODE if p.stem in banned]
    top = {p.stem for p in (ROOT / "speed_engine").iterdir() if p.suffix == ".py" or p.is_dir()}
    others = {"datasets", "evaluate", "kernels", "tokenizers", "transformers", "wandb"}
    assert not top & (set(sys.stdlib_module_names) | others)


def test_kernels_is_a_namespace_folder() -> None:
    """With an __init__.py it would hide the Hugging Face package `kernels` and break diffusers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_importing_is_cheap() -> None:
    """Importing the packages loads none of the heavy ones, and builds nothing."""
    code = (
        "import sys, speed_engine, speed_kernels, speed_engine.__main__\n"
        "print([m for m in ('torch', 'deepspeed', 'diffusers', 'triton', 'webdataset', 'matplotlib') "
        "if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]", answer.stdout + answer.stderr


def test_the_top_level_is_fixed() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    allowed = {"pyproject.toml", "csrc", "speed_engine", "kernels", "benchmarks", "tests"}
    allowed |= {"README.md", "Makefile", "LICENSE"}
    assert not [name for name in top if name not in allowed and not name.startswith(".")]
