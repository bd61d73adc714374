"""Builds the C++ kernels of `csrc/` on first use and loads them.

One source file becomes one shared library with a plain C interface, compiled for this machine's instruction set in a
few seconds (only ATen's thread pool is included) and kept in a cache. The cache key holds everything the binary
depends on: torch's version, the compiler, the flags and the text of the sources. Many processes may start at once.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

# The instruction set is chosen at run time, on the machine that will run the code: x86-64-v4 is AVX-512 (F, BW, CD,
# DQ, VL), v3 is AVX2 with FMA.
ISA_FLAGS = {
    "AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "AVX2": ("-march=x86-64-v3",),
    "DEFAULT": (),
}
BASE_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
)


class BuildError(RuntimeError):
    """The C++ kernels cannot be built here; the text says why."""


def isa() -> str:
    """The instruction set of this processor: AVX512, AVX2 or DEFAULT (whatever the compiler assumes)."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        capability
        if capability in ISA_FLAGS and platform.machine() in ("x86_64", "AMD64")
        else "DEFAULT"
    )


def source_folder() -> Path:
    """Where the C++ sources are: `csrc/` of a checkout, or the copy inside the installed package."""
    here = Path(__file__).resolve()
    for folder in (here.parents[2] / "csrc", here.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise BuildError("the folder csrc with the C++ sources is missing; reinstall speed-engine")


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/speed_kernels`, or `~/.cache/speed_kernels`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speed_kernels"


@functools.cache
def compiler() -> tuple[str, str]:
    """Path and version line of the C++ compiler: `$CXX` if set, else g++ or clang++. Raises BuildError for none."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("g++", "clang++"):
        path = shutil.which(name)
        if path:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True)
            if answer.returncode == 0:
                return path, (answer.stdout.splitlines() or [path])[0]
    if chosen:
        raise BuildError(f"CXX={chosen} cannot be run; set it to the path of g++ or clang++")
    raise BuildError("no C++ compiler: install g++ or clang++, or set CXX")


def unavailable() -> str | None:
    """Why C++ kernels cannot be built here, or None."""
    try:
        compiler()
        source_folder()
    except BuildError as error:
        return str(error)
    return None


@functools.cache
def load(source: str, isa_name: str | None = None) -> ctypes.CDLL:
    """The library built from `csrc/<source>`, from the cache or compiled now.

    `isa_name` (AVX512, AVX2, DEFAULT) overrides the processor's own, for tests. Raises BuildError with the
    compiler's message.
    """
    path, version = compiler()
    folder = source_folder()
    flags = BASE_FLAGS + ISA_FLAGS[isa_name or isa()]
    digest = hashlib.sha256(repr((torch.__version__, version, flags, platform.machine())).encode())
    for file in sorted((folder / source, *folder.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    cache = cache_folder()
    target = cache / f"{Path(source).stem}-{digest.hexdigest()[:20]}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / f"{target.stem}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(target):
                _announced(path, version, flags, folder / source, target)
    except OSError as error:
        raise BuildError(
            f"cannot write the kernel cache {cache}: {error}; set XDG_CACHE_HOME"
        ) from error
    return ctypes.CDLL(str(target))


def _is_whole(target: Path) -> bool:
    """Whether the library is the one that was built: loading a truncated one would kill the process (SIGBUS)."""
    try:
        stated = _seal_of(target).read_text(encoding="ascii")
        return stated == hashlib.sha256(target.read_bytes()).hexdigest()
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _seal_of(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _announced(path: str, version: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Compile, with a line on standard error: whoever waits should know what for, and that it happens once."""
    began = time.monotonic()
    print(
        f"compiling {source.name} for this machine, once ...", end="", file=sys.stderr, flush=True
    )
    done = "failed"
    try:
        _compile(path, version, flags, source, target)
        done = f"{time.monotonic() - began:.1f} s, kept in {target.parent}"
    finally:
        print(f" {done}", file=sys.stderr, flush=True)


def _compile(path: str, version: str, flags: tuple[str, ...], source: Path, target: Path) -> None:
    """Compile to a temporary file, then rename: a killed build leaves nothing that could be loaded."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        part, output = Path(scratch) / "part.o", Path(scratch) / target.name
        compiling = [
            path,
            *flags,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        compiling += [f"-I{torch_folder / 'include'}", "-c", str(source), "-o", str(part)]
        linking = [path, "-shared", str(part), "-o", str(output)]
        linking += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        if "clang" in version:
            # Its OpenMP calls are not in the GNU runtime that torch brings.
            linking.append("-fopenmp")
        # g++ links no OpenMP runtime of its own: the symbols come through libtorch_cpu from the copy that torch uses,
        # or a second pool of threads would run that knows nothing of torch.set_num_threads.
        for command in (compiling, linking):
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode < 0:
                raise BuildError(
                    f"{path} was killed by signal {-answer.returncode} while it compiled {source.name}; "
                    "the machine may be short of memory"
                )
            if answer.returncode != 0:
                raise BuildError(
                    f"{source.name} does not compile with {path}:\n{answer.stderr.strip()}"
                )
        if not output.exists():
            raise BuildError(f"{path} makes no library of {source.name}; is it a C++ compiler?")
        with output.open("rb") as made:
            os.fsync(made.fileno())
            digest = hashlib.file_digest(made, "sha256").hexdigest()
        os.replace(output, target)
        seal = Path(scratch) / "seal"
        seal.write_text(digest, encoding="ascii")
        os.replace(seal, _seal_of(target))
