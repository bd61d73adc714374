"""The wheel: built without network, installed beside nothing, everything in it that a command reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
ALONE = ["--no-deps", "--no-index"]


def build_and_install(folder: Path) -> Path:
    """The folder of packages that `pip install` of the wheel makes, from what git tracks and what is new here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    wheel = [*PIP, "wheel", *ALONE, "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run(wheel, check=True, timeout=200)
    (built,) = folder.glob("*.whl")
    subprocess.run([*PIP, "install", *ALONE, "--target", folder / "site", built], check=True)
    return folder / "site"


def from_the_wheel(site: Path, *words: str | Path, **environment: str) -> str:
    """What `speed-engine WORDS` of the installed wheel says, to a good end, in the folder beside it."""
    found = {**os.environ, "PYTHONPATH": str(site), **environment}
    done = subprocess.run(
        [sys.executable, site / "bin" / "speed-engine", *words],
        env=found,
        cwd=site.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="builds the wheel; pip install 'speed-engine[test]'")
    return build_and_install(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_file_of_the_packages(site):
    for package, source in (
        ("speed_engine", "speed_engine"),
        ("speed_kernels", "kernels/speed_kernels"),
        ("speed_kernels/csrc", "csrc"),
    ):
        tracked = {
            path.relative_to(site.parent / "source" / source)
            for path in (site.parent / "source" / source).rglob("*")
            if path.is_file()
        }
        assert len(tracked) > 3
        assert {path for path in tracked if not (site / package / path).is_file()} == set()
    stray = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert stray == {"speed_engine", "speed_kernels", "bin"}


def test_the_console_script_tells_of_itself(site):
    assert "usage: speed-engine" in from_the_wheel(site, "--help")
    assert "timesteps.k = number" in from_the_wheel(site, "keys", "timesteps", "speed")
