"""Choosing backends, and what every op of the library must offer."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from speed_kernels import contract
from speed_kernels.contract import BackendError, choose

OPS = contract.ops()


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Declare which backends can run: a dictionary from the backend's name to why it cannot, or None."""

    def declare(**reasons: str | None) -> None:
        def implementation(op: str, backend: str) -> SimpleNamespace:
            return SimpleNamespace(unavailable=lambda: reasons[backend])

        monkeypatch.setattr(contract, "implementation", implementation)
        monkeypatch.setattr(contract, "backends", lambda op: list(reasons))

    return declare


def test_ops_and_their_backends() -> None:
    assert {"noise", "loss"} <= set(OPS)
    for op in ("noise", "loss"):
        assert contract.backends(op) == ["triton", "cpp", "reference"]


def test_auto_takes_the_fastest(only) -> None:
    only(triton=None, cpp=None, reference=None)
    assert choose("noise", "cpu").backend == "cpp"
    found = choose("noise", torch.device("cuda", 1))
    assert found == contract.Choice("noise", "triton", "the fastest backend for cuda", False)


def test_a_fallback_carries_its_reason(only) -> None:
    only(triton=None, cpp="no C++ compiler", reference=None)
    found = choose("noise", "cpu")
    assert (found.backend, found.fallback) == ("reference", True)
    assert found.reason == "cpp: no C++ compiler"


def test_strict_forbids_a_fallback(only) -> None:
    only(triton=None, cpp="no C++ compiler", reference=None)
    with pytest.raises(BackendError, match=r"kernels.strict forbids .* cpp: no C\+\+ compiler"):
        choose("noise", "cpu", strict=True)
    assert choose("noise", "cuda", strict=True).backend == "triton"


def test_strict_is_content_with_an_op_that_has_only_the_reference(only) -> None:
    only(reference=None)
    found = choose("noise", "cpu", strict=True)
    assert (found.backend, found.fallback) == ("reference", False)


def test_an_explicit_backend_must_run(only) -> None:
    only(triton=None, cpp="no C++ compiler", reference=None)
    assert choose("noise", "cpu", "reference").reason == "asked for"
    with pytest.raises(BackendError, match=r"kernels.backend=cpp: noise cannot use it: no C"):
        choose("noise", "cpu", "cpp")


def test_backends_are_bound_to_their_device() -> None:
    with pytest.raises(BackendError, match="C\\+\\+ kernels run on the CPU, not on cuda"):
        choose("noise", "cuda", "cpp")
    with pytest.raises(BackendError, match="Triton kernels run on CUDA devices, not on cpu"):
        choose("noise", "cpu", "triton")


def test_a_machine_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any file that imports it is loaded: macOS and Windows have none."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(contract, "implementation", lambda op, backend: pytest.fail("was loaded"))
    for op in OPS:
        if "triton" in contract.backends(op):
            assert contract.unavailable(op, "triton", "cuda") == "triton is not installed"


def test_unknown_backend_names_those_that_exist() -> None:
    with pytest.raises(BackendError, match="no backend 'cuda'; it has: triton, cpp, reference"):
        contract.implementation("noise", "cuda")


def test_no_backend_at_all(only) -> None:
    only(reference="no torch")
    with pytest.raises(BackendError, match="no backend of noise runs on cpu: reference: no torch"):
        choose("noise", "cpu")


@pytest.mark.parametrize("op", OPS)
def test_every_op_documents_itself_and_offers_inputs(op: str) -> None:
    module = importlib.import_module(f"speed_kernels.{op}.op")
    assert module.__doc__ and len(module.__doc__.splitlines()) >= 3
    if hasattr(torch.ops.speed_kernels, op):
        assert callable(module.sample_inputs)


@pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in OPS for backend in contract.backends(op)]
)
def test_every_backend_says_whether_it_can_run(op: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    module = contract.implementation(op, backend)
    assert module.__doc__
    assert not inspect.signature(module.unavailable).parameters
    reason = module.unavailable()
    assert reason is None or (isinstance(reason, str) and reason)


def test_importing_the_library_builds_nothing_and_needs_no_triton() -> None:
    """Importing the ops neither compiles, nor imports triton, nor starts CUDA."""
    code = (
        "import sys, speed_kernels.contract as c, importlib, torch\n"
        "before = set(sys.modules)\n"
        "import subprocess; subprocess.run = subprocess.Popen = None\n"
        "for op in ('noise', 'loss'): importlib.import_module(f'speed_kernels.{op}.op')\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert 'triton' not in new, new\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
