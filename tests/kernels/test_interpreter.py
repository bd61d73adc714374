"""Triton's kernels interpreted on the CPU: the tests of this folder again, in one process that decides so first.

Triton reads TRITON_INTERPRET when a kernel is defined, so that no running process can change its mind. One file alone:
`TRITON_INTERPRET=1 pytest tests/kernels/test_loss.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Those whose list of backends knows the interpreter.
FILES = sorted(
    str(file)
    for file in HERE.glob("test_*.py")
    if '("triton", "cpu")' in file.read_text(encoding="utf-8") and file != Path(__file__)
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is already running")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_triton_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert len(FILES) >= 7
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *FILES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-2000:]
