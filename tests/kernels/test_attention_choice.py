"""Attention: which implementation is chosen, why, and what cannot be."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from speed_kernels.attention import flash_gpu, measure, op, sdpa, xformers_gpu
from speed_kernels.attention.interface import Backend, Case
from speed_kernels.contract import BackendError
from torch.nn import attention
from torch.nn.attention import _registry

CASE = Case(torch.device("cuda", 0), torch.bfloat16, 32, 256, 16, 72)


def fake(milliseconds, why_not=None, unfit=None, flash=None) -> Backend:
    """A backend that `timed` says takes so long; an exception instead of a number is raised."""

    def attend(qkv):
        raise AssertionError("choosing runs nothing by itself")

    attend.milliseconds = milliseconds  # pyright: ignore
    return Backend(attend, lambda: why_not, lambda case: unfit, flash)


def timed(attend, case):
    assert case == CASE
    if isinstance(attend.milliseconds, Exception):
        raise attend.milliseconds
    return attend.milliseconds


def decided(**backends: Backend):
    return op.decide(CASE, "Some GPU", backends, timed)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that has GPU 0, of compute capability 9.0, as far as the choice can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    op._measured.cache_clear()
    yield
    op._measured.cache_clear()


@pytest.fixture
def plugged(monkeypatch):
    """FA3 and FA4 can be put behind torch's operator; nothing is there before or after."""

    class Handle:
        def remove(self) -> None:
            pass

    for name in ("FA3", "FA4"):
        monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, Handle)
    yield
    flash_gpu.activate("FA2")


def test_the_fastest_is_taken_and_all_times_are_told():
    choice = decided(a=fake(0.5), b=fake(0.25), c=fake(1234.5))
    assert (choice.op, choice.backend, choice.fallback) == ("attention", "b", False)
    assert choice.reason == (
        "b 0.25 ms, a 0.5 ms, c 1.23e+03 ms:"
        " forward + backward of [32, 256, 3, 16, 72] bfloat16 on Some GPU"
    )


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ((1.0, 1.0, 1.0), "a"),
        ((1.029, 1.0, 2.0), "a"),
        ((1.031, 1.0, 2.0), "b"),
        (
            (1.05, 1.02, 1.0),
            "b",
        ),  # from the fastest it is measured, not from neighbour to neighbour
        ((2.0, 1.0, 0.99), "b"),
        ((2.0, 2.0, 1.0), "c"),
    ],
)
def test_equally_fast_is_decided_by_the_fixed_order(times, winner):
    choice = decided(**{word: fake(ms) for word, ms in zip("abc", times, strict=True)})
    assert choice.backend == winner
    tie = times["abc".index(winner)] != min(times)
    assert ("equal to the fastest within 3 %" in choice.reason) is tie


def test_what_cannot_run_or_fails_is_left_out_with_its_reason():
    choice = decided(
        a=fake(0.1, why_not="a is not installed"),
        b=fake(0.1, unfit="b takes no head of 72"),
        c=fake(torch.OutOfMemoryError("out of memory\nand a long table")),
        d=fake(AssertionError()),
        e=fake(0.9),
    )
    assert choice.backend == "e" and not choice.fallback
    assert choice.reason.startswith("e 0.9 ms: forward")
    assert choice.reason.endswith(
        "; without a: a is not installed; without b: b takes no head of 72;"
        " without c: OutOfMemoryError: out of memory; without d: AssertionError: "
    )


def test_a_probe_that_fails_is_no_candidate():
    def broken():
        raise RuntimeError("no symbol")

    choice = decided(a=Backend(sdpa.attend, broken, lambda case: None), b=fake(1.0))
    assert choice.backend == "b" and "without a: RuntimeError: no symbol" in choice.reason


def test_where_nothing_runs_torchs_own_is_the_fallback():
    choice = decided(sdpa=fake(RuntimeError("broken")), b=fake(1, why_not="b is missing"))
    assert choice.backend == "sdpa" and choice.fallback
    assert "nothing could be measured" in choice.reason and "RuntimeError: broken" in choice.reason


def test_each_is_timed_with_its_own_flash_kernel_behind_torchs_operator(plugged):
    served = {}

    def watched(attend, case):
        served[attend.milliseconds] = attention.current_flash_attention_impl()
        if attend.milliseconds == 3:
            raise RuntimeError("fails")
        return attend.milliseconds

    backends = {"any": fake(1), "own": fake(2, flash="FA2"), "three": fake(3, flash="FA3")}
    backends["four"] = fake(4, flash="FA4")
    op.decide(CASE, "Some GPU", backends, watched)
    assert served == {1: None, 2: None, 3: "FA3", 4: "FA4"}
    assert attention.current_flash_attention_impl() is None
    flash_gpu.activate("FA4")
    op.decide(CASE, "Some GPU", backends, watched)
    assert served == {1: "FA4", 2: None, 3: "FA3", 4: "FA4"}
    assert attention.current_flash_attention_impl() == "FA4"


def test_without_a_gpu_auto_is_torchs_attention_and_says_so():
    for device in ("cpu", "meta"):
        choice = op.choose_attention(device, head_dim=72)
        assert (choice.op, choice.backend, choice.fallback) == ("attention", "sdpa", False)
        assert device in choice.reason
    assert op.choose_attention("cpu", "sdpa", head_dim=72).reason == "asked for"
    assert op.choose_attention("cpu", "sdpa_flash", head_dim=72).backend == "sdpa_flash"
    if not torch.cuda.is_available():
        choice = op.choose_attention("cuda", head_dim=72)
        assert choice.backend == "sdpa" and "no cuda device" in choice.reason


def test_on_a_gpu_auto_measures_once_for_each_case(monkeypatch, gpu):
    cases = []

    def milliseconds(attend, case):
        # Models are built inside `with torch.device("meta")`; what is measured is not.
        assert torch.get_default_device() == torch.device("cuda", 0)
        cases.append(case)
        return 1.0 if attend is sdpa.attend_efficient else 2.0

    monkeypatch.setattr(measure, "milliseconds", milliseconds)
    monkeypatch.setattr(op, "BACKENDS", {"sdpa": sdpa.ANY, "sdpa_efficient": sdpa.EFFICIENT})
    with torch.device("meta"):
        choice = op.choose_attention("cuda", head_dim=72)
    assert choice.backend == "sdpa_efficient" and "sdpa_efficient 1 ms, sdpa 2 ms" in choice.reason
    assert cases == [CASE, CASE]
    assert op.choose_attention("cuda:0", "auto", head_dim=72) is choice and len(cases) == 2
    op.choose_attention("cuda", head_dim=64)
    op.choose_attention("cuda", head_dim=72, num_tokens=64, num_heads=6, dtype=torch.float16)
    assert cases[-1] == Case(torch.device("cuda", 0), torch.float16, 32, 64, 6, 72)
    assert len(cases) == 6
    torch.use_deterministic_algorithms(True)
    try:
        op.choose_attention("cuda", head_dim=72)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(cases) == 8


def test_a_chosen_flash_kernel_serves_from_then_on(monkeypatch, gpu, plugged):
    backends = {"flash3": fake(1, flash="FA3"), "sdpa_flash": fake(1, flash="FA2")}
    monkeypatch.setattr(op, "BACKENDS", backends | {"sdpa": sdpa.ANY})
    assert op.choose_attention("cuda", "flash3", head_dim=72).backend == "flash3"
    assert attention.current_flash_attention_impl() == "FA3"
    op.choose_attention("cuda", "sdpa", head_dim=72)
    op.choose_attention("meta", "sdpa_flash", head_dim=72)
    assert attention.current_flash_attention_impl() == "FA3"
    op.choose_attention("cuda", "sdpa_flash", head_dim=72)
    assert attention.current_flash_attention_impl() is None

    def refuse():
        raise RuntimeError("does not expose FA3 backward kernels")

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", refuse)
    with pytest.raises(BackendError, match=r"model\.attention=flash3 cannot run: does not expose"):
        op.choose_attention("cuda", "flash3", head_dim=72)


def test_on_meta_everything_that_has_a_name_is_granted():
    for word in op.BACKENDS:
        assert op.choose_attention("meta", word, head_dim=72).backend == word
    with pytest.raises(BackendError, match="no backend 'flash'"):
        op.choose_attention("meta", "flash", head_dim=72)


def test_unknown_attention_lists_what_exists():
    names = "sdpa, sdpa_cudnn, sdpa_flash, sdpa_efficient, flash3, flash4, xformers"
    for call in (
        lambda: op.choose_attention("cpu", "flash", head_dim=8),
        lambda: op.implementation("flash"),
    ):
        with pytest.raises(BackendError, match=f"'flash'; it has: {names}$"):
            call()


@pytest.mark.parametrize("word", ["sdpa_cudnn", "sdpa_efficient", "flash3", "flash4", "xformers"])
def test_what_needs_a_gpu_is_refused_on_the_cpu_with_the_reason(word):
    with pytest.raises(BackendError, match=rf"model\.attention={word} cannot run: .+"):
        op.choose_attention("cpu", word, head_dim=72)


GENERATIONS = {"A100": (8, 0), "H200": (9, 0), "B200": (10, 0), "RTX 2080": (7, 5)}


@pytest.mark.parametrize(
    ("word", "gpus", "sizes"),
    [
        ("sdpa", ["A100", "H200", "B200", "RTX 2080"], [36, 64, 72, 128, 256, 264]),
        ("sdpa_cudnn", ["A100", "H200", "B200"], [64, 72, 128]),
        ("sdpa_flash", ["A100", "H200", "B200"], [64, 72, 128, 256]),
        ("sdpa_efficient", ["A100", "H200", "B200", "RTX 2080"], [64, 72, 128, 256, 264]),
        ("flash3", ["H200"], [64, 72, 128, 256]),
        ("flash4", ["H200", "B200"], [64, 72, 128]),
    ],
)
def test_which_gpu_and_which_head_each_takes(monkeypatch, word, gpus, sizes):
    unsupported = op.BACKENDS[word].unsupported
    for gpu, capability in GENERATIONS.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        why_not = unsupported(CASE)
        assert (why_not is None) is (gpu in gpus), f"{word} on {gpu}: {why_not}"
        if gpu == gpus[-1]:
            taken = [
                k for k in (36, 64, 72, 128, 256, 264) if not unsupported(CASE._replace(head_dim=k))
            ]
            assert taken == sizes
        elif gpu in gpus:
            why_not = unsupported(CASE._replace(head_dim=36))
            assert why_not is None or "not 36" in why_not


def test_flash4_takes_larger_heads_on_hopper_than_on_blackwell(monkeypatch):
    for capability, largest in (((9, 0), 256), ((10, 0), 128)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert flash_gpu._unsupported_4(CASE._replace(head_dim=largest)) is None
        assert f"up to {largest}, not 264" in flash_gpu._unsupported_4(CASE._replace(head_dim=264))


def test_dtypes_that_a_kernel_has_no_code_for(gpu):
    single = CASE._replace(dtype=torch.float32)
    for word in ("sdpa_cudnn", "sdpa_flash", "flash3", "flash4"):
        assert "float16 or bfloat16, not in float32" in op.BACKENDS[word].unsupported(single)
    efficient = op.BACKENDS["sdpa_efficient"].unsupported
    assert efficient(single) is None and efficient(single._replace(head_dim=36)) is None
    assert "not in float64" in efficient(single._replace(dtype=torch.float64))


@pytest.mark.parametrize(
    ("version", "tokens", "refused"),
    [
        (91002, 256, False),
        (91002, 64, True),
        (91501, 64, False),
        (None, 64, True),
        (91501, 1, True),
    ],
)
def test_cudnn_that_is_not_safe_for_a_length_is_not_used(
    monkeypatch, gpu, version, tokens, refused
):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    why_not = sdpa._unsupported_cudnn(CASE._replace(tokens=tokens))
    assert (why_not is not None) is refused


def test_cudnn_is_not_used_where_torch_is_told_to_be_deterministic(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in (sdpa._unsupported_cudnn(CASE) or "")
    finally:
        torch.use_deterministic_algorithms(False)
    assert sdpa._unsupported_cudnn(CASE) is None


def test_xformers_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    if xformers_gpu.unavailable() is not None:
        with pytest.raises(BackendError, match=r"model\.attention=xformers cannot run: xformers"):
            op.choose_attention("cuda", "xformers", head_dim=64)
    installed = Backend(xformers_gpu.attend, lambda: None, xformers_gpu.unsupported)
    monkeypatch.setitem(op.BACKENDS, "xformers", installed)
    with pytest.raises(BackendError, match="CUDA devices, not on cpu"):
        op.choose_attention("cpu", "xformers", head_dim=64)
    with pytest.raises(BackendError, match="multiple of 8, not 36"):
        op.choose_attention("cuda", "xformers", head_dim=36)
    assert op.choose_attention("cuda", "xformers", head_dim=72).backend == "xformers"


@pytest.mark.parametrize("flash", ["FA3", "FA4"])
def test_flash_attention_says_what_is_missing(monkeypatch, gpu, flash):
    module, cure = flash_gpu.PACKAGES[flash]
    monkeypatch.setitem(sys.modules, module.split(".")[0], None)  # not installed, whatever is
    assert flash_gpu.unavailable(flash) == f"{module} is not installed; {cure}"
    for name in ("flash_attn", "flash_attn.cute", module):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert flash_gpu.unavailable(flash) is None
    monkeypatch.delitem(_registry._FLASH_ATTENTION_IMPLS, flash)
    assert f"has no place for {flash}" in (flash_gpu.unavailable(flash) or "")


def test_flash_attention_that_cannot_be_imported_says_why(monkeypatch, gpu, tmp_path):
    (tmp_path / "flash_attn_interface.py").write_text("import cutlass_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    why_not = flash_gpu.unavailable("FA3") or ""
    assert why_not.startswith("flash_attn_interface is installed but cannot be imported: No module")


def test_flash_attention_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash_gpu.unavailable("FA3") == "FA3 needs a CUDA device, and there is none"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_the_choice_is_measured():
    choice = op.choose_attention("cuda", head_dim=72)
    assert choice.backend in op.BACKENDS and not choice.fallback
    assert " ms" in choice.reason and torch.cuda.get_device_name(0) in choice.reason
