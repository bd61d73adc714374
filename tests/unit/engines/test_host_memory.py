"""Freed memory stays with the process, where nobody has said otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from speed_engine.engines.host_memory import SETTINGS, keep_freed_memory

PROGRAM = """
import resource, torch
from speed_engine.engines.host_memory import keep_freed_memory
if {told}:
    assert keep_freed_memory(torch.device("cpu")) == "freed memory stays with the process"
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_the_next_tensor_takes_the_pages_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    told, untold = (
        int(subprocess.check_output([sys.executable, "-c", PROGRAM.format(told=told)], text=True))
        for told in (True, False)
    )
    assert told < 100 <= untold  # 64 MiB are 16384 pages, or 32 large ones


def test_what_a_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    assert "MALLOC_MMAP_MAX_" in keep_freed_memory(torch.device("cpu"))
    assert "cuda" in keep_freed_memory(torch.device("cuda"))
