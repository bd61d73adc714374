"""Building C++ kernels on first use: cached by content, safe among processes, loud when it fails."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from speed_kernels import build

ANSWER = '#include "number.h"\nextern "C" int answer() { return kNumber; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source folder and an empty cache of the test's own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.cpp").write_text(ANSWER)
    (folder / "number.h").write_text("constexpr int kNumber = 42;\n")
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load.cache_clear()
    build.compiler.cache_clear()
    yield folder
    build.load.cache_clear()
    build.compiler.cache_clear()


def libraries() -> list[Path]:
    return sorted(build.cache_folder().glob("*.so"))


def test_builds_once_and_reuses(sources: Path) -> None:
    assert build.load("answer.cpp").answer() == 42
    (library,) = libraries()
    written = library.stat().st_mtime_ns
    build.load.cache_clear()
    assert build.load("answer.cpp").answer() == 42
    assert libraries() == [library] and library.stat().st_mtime_ns == written


def test_a_build_is_announced_once(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.load("answer.cpp")
    said = capsys.readouterr().err
    assert said.startswith("compiling answer.cpp for this machine, once ... ")
    assert said.endswith(f" s, kept in {build.cache_folder()}\n")
    build.load.cache_clear()
    build.load("answer.cpp")
    assert capsys.readouterr().err == ""
    (sources / "answer.cpp").write_text("no C++")
    build.load.cache_clear()
    with pytest.raises(build.BuildError):
        build.load("answer.cpp")
    assert capsys.readouterr().err.endswith("... failed\n")


@pytest.mark.parametrize("damage", [b"", b"\x7fELF garbage", None])
def test_a_damaged_library_is_built_anew(sources: Path, damage: bytes | None) -> None:
    """A truncated one would kill the process that loads it."""
    build.load("answer.cpp")
    (library,) = libraries()
    whole = library.read_bytes()
    library.unlink()  # it is loaded in this process: its own file must not change
    library.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    build.load.cache_clear()
    assert build.load("answer.cpp").answer() == 42
    assert len(library.read_bytes()) == len(whole)


@pytest.mark.parametrize("words", ["", "fake 1.0"])
def test_a_compiler_that_makes_nothing_is_told(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    fake = tmp_path / "fake"
    fake.write_text(f"#!/bin/sh\necho {words}\n" if words else "#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(build.BuildError, match=r"makes no library of answer\.cpp"):
        build.load("answer.cpp")


def test_a_changed_header_is_another_library(sources: Path) -> None:
    build.load("answer.cpp")
    (sources / "number.h").write_text("constexpr int kNumber = 43;\n")
    build.load.cache_clear()
    assert build.load("answer.cpp").answer() == 43
    assert len(libraries()) == 2


def test_every_instruction_set_is_another_library(sources: Path) -> None:
    build.load("answer.cpp", "DEFAULT")
    build.load("answer.cpp", build.isa())
    assert len(libraries()) == len({"DEFAULT", build.isa()})


def test_a_failed_build_says_what_the_compiler_said_and_leaves_nothing(sources: Path) -> None:
    (sources / "answer.cpp").write_text("this is no C++\n")
    with pytest.raises(build.BuildError, match=r"answer.cpp does not compile(.|\n)*error"):
        build.load("answer.cpp")
    assert libraries() == [] and not [
        path for path in build.cache_folder().iterdir() if path.is_dir()
    ]
    (sources / "answer.cpp").write_text(ANSWER)
    assert build.load("answer.cpp").answer() == 42


def test_a_cache_that_cannot_be_written_is_named(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        build.BuildError, match=r"cannot write the kernel cache .*set XDG_CACHE_HOME"
    ):
        build.load("answer.cpp")


def test_no_compiler_is_a_reason_and_not_a_crash(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.unavailable() == "no C++ compiler: install g++ or clang++, or set CXX"
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.load("answer.cpp")


def test_a_chosen_compiler_that_is_missing_is_not_replaced(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "CXX=/nonexistent/c++ cannot be run" in str(build.unavailable())


def test_missing_sources_are_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "a" / "b" / "c" / "build.py"))
    assert "csrc" in str(build.unavailable())


def test_available_here() -> None:
    assert build.unavailable() is None
    assert build.isa() in build.ISA_FLAGS
    assert (build.source_folder() / "noise.cpp").exists()


def test_many_processes_may_start_at_once(sources: Path) -> None:
    """All of them build one library between them, and none loads a half-written one."""
    code = (
        "import sys; from pathlib import Path; from speed_kernels import build;"
        "build.source_folder = lambda: Path(sys.argv[1]); print(build.load('answer.cpp').answer())"
    )
    kernels = Path(build.__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(sources)],
            env={**os.environ, "PYTHONPATH": str(kernels)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["42"] * 3
    assert len(libraries()) == 1


def test_kernels_run_on_torch_s_own_threads(sources: Path) -> None:
    """Not on a second pool, which would not know torch.set_num_threads."""
    (sources / "threads.cpp").write_text(
        "#include <ATen/Parallel.h>\n"
        "#include <atomic>\n"
        'extern "C" int64_t parts() {\n'
        "  std::atomic<int64_t> count{0};\n"
        "  at::parallel_for(0, 1000, 1, [&](int64_t, int64_t) { ++count; });\n"
        "  return count;\n"
        "}\n"
    )

    def runtimes() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split()[-1] for line in lines if "gomp" in line}

    known = runtimes()  # torch's; other packages may have brought their own
    parts = build.load("threads.cpp").parts
    parts.restype = ctypes.c_int64
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert parts() == num_threads
    finally:
        torch.set_num_threads(before)
    assert runtimes() <= known


def test_threads_of_one_process_may_load_at_once(sources: Path) -> None:
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(build.load("answer.cpp").answer()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 4 and len(libraries()) == 1
