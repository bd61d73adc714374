"""The rules of the house, as far as a program can check them: files and names. Who imports whom is test_imports.py."""

import ast
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_engines_top_level_is_small() -> None:
    """What lies beside the folders is an entry point, the library or what everybody needs."""
    assert len([p for p in (ROOT / "speed_engine").iterdir() if p.is_file()]) <= 12


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


def test_commands_import_what_they_need() -> None:
    """What only tells something waits for no library but torch, and for that one last."""
    code = """
import contextlib, io, sys
from speed_engine.__main__ import main
from speed_engine.reports import doctor
heavy = {"torch", "deepspeed", "diffusers", "triton", "webdataset", "matplotlib", "sympy", "sklearn", "transformers"}
doctor.installed()
found = [("versions", heavy & set(sys.modules))]
for words in (["doctor"], ["keys"], ["table"]):
    sys.argv = ["speed_engine", *words]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main() == 0, words
    found.append((words[0], (heavy - {"torch"}) & set(sys.modules)))
print([each for each in found if each[1]])
"""
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
