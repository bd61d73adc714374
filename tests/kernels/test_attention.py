"""Attention: every implementation is the definition, on the layout that the model gives it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from speed_kernels.attention import op, sdpa, xformers_gpu
from speed_kernels.contract import BackendError


def softmax_attention(qkv: torch.Tensor) -> torch.Tensor:
    """One head and one query at a time, in fp64."""
    batch, tokens, _, heads, size = qkv.shape
    qkv = qkv.double()
    out = torch.empty(batch, tokens, heads, size, dtype=torch.float64)
    for b in range(batch):
        for n in range(heads):
            q, k, v = qkv[b, :, 0, n], qkv[b, :, 1, n], qkv[b, :, 2, n]
            for t in range(tokens):
                score = torch.exp((k @ q[t]) / size**0.5)
                out[b, t, n] = (score / score.sum()) @ v
    return out


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 1, 3, 2, 8), (1, 7, 3, 3, 5), (2, 63, 3, 2, 72)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_sdpa_and_reference_are_softmax_attention(shape, dtype, tolerance):
    qkv = drawn(*shape, dtype=torch.float64).to(dtype)
    wanted = softmax_attention(qkv)
    for attend in (op.implementation("sdpa"), op.reference):
        found = attend(qkv)
        assert found.shape == (*shape[:2], *shape[3:]) and found.dtype == dtype
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < tolerance


def test_sdpa_gradient_is_the_references():
    qkv = drawn(2, 9, 3, 2, 8, dtype=torch.float64).requires_grad_()
    upstream = drawn(2, 9, 2, 8, dtype=torch.float64)
    (found,) = torch.autograd.grad(sdpa.attend(qkv), qkv, upstream)
    (wanted,) = torch.autograd.grad(op.reference(qkv), qkv, upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(sdpa.attend, qkv)


def test_strided_input_is_taken_as_it_is():
    wide = drawn(2, 8, 3, 2, 3, 16)  # every third slice of a larger tensor
    qkv = wide[:, :, :, :, 1]
    assert not qkv.is_contiguous()
    torch.testing.assert_close(sdpa.attend(qkv), sdpa.attend(qkv.contiguous()))


def test_large_scores_do_not_overflow():
    qkv = drawn(1, 16, 3, 1, 8) * 1e3
    assert torch.isfinite(sdpa.attend(qkv)).all()


def test_auto_takes_torchs_attention_and_says_so():
    for device in ("cpu", "cuda", "meta"):
        choice = op.choose_attention(device, head_dim=72)
        assert (choice.op, choice.backend, choice.fallback) == ("attention", "sdpa", False)
        assert device in choice.reason
    assert op.choose_attention("cpu", "sdpa", head_dim=72).reason == "asked for"


def test_xformers_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    if xformers_gpu.unavailable() is not None:
        with pytest.raises(BackendError, match=r"model\.attention=xformers cannot run: xformers"):
            op.choose_attention("cuda", "xformers", head_dim=64)
    monkeypatch.setattr(xformers_gpu, "unavailable", lambda: None)
    with pytest.raises(BackendError, match="CUDA devices, not on cpu"):
        op.choose_attention("cpu", "xformers", head_dim=64)
    with pytest.raises(BackendError, match="multiple of 8, not 36"):
        op.choose_attention("cuda", "xformers", head_dim=36)
    assert op.choose_attention("cuda", "xformers", head_dim=72).backend == "xformers"


def test_unknown_attention_lists_what_exists():
    for call in (
        lambda: op.choose_attention("cpu", "flash", head_dim=8),
        lambda: op.implementation("flash"),
    ):
        with pytest.raises(BackendError, match="'flash'; it has: sdpa, xformers"):
            call()


def test_xformers_gets_its_own_order_of_axes(monkeypatch):
    """memory_efficient_attention takes and returns [B, T, N, K]."""

    def memory_efficient_attention(q, k, v):
        assert q.shape == (2, 5, 3, 8) and not q.is_contiguous()
        return op.reference(torch.stack([q, k, v], dim=2))

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = memory_efficient_attention  # pyright: ignore
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    qkv = drawn(2, 5, 3, 3, 8)
    torch.testing.assert_close(op.implementation("xformers")(qkv), sdpa.attend(qkv))


@pytest.mark.skipif(xformers_gpu.unavailable() is not None, reason="needs xformers and a GPU")
def test_xformers_is_softmax_attention_on_the_gpu():
    qkv = drawn(2, 64, 3, 4, 72).cuda().bfloat16()
    found, wanted = xformers_gpu.attend(qkv).double(), op.reference(qkv.double())
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-2
