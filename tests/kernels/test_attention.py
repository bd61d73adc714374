"""Attention: every implementation is the definition, on the layout that the model gives it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from speed_kernels.attention import measure, op, sdpa, xformers_gpu
from speed_kernels.attention.interface import Case
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode


def math_only(qkv: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa.attend(qkv)


# What this machine's torch can run on the CPU.
RUNNING = {
    "reference": op.reference,
    "sdpa": op.implementation("sdpa"),
    "sdpa_flash": op.implementation("sdpa_flash"),
    "math": math_only,
}
each = pytest.mark.parametrize("attend", RUNNING.values(), ids=RUNNING.keys())


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


def all_kernels_enabled() -> bool:
    cuda = torch.backends.cuda
    enabled = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    return all(kernel() for kernel in (*enabled, cuda.cudnn_sdp_enabled))


@each
@pytest.mark.parametrize("shape", [(2, 1, 3, 2, 8), (1, 7, 3, 3, 5), (2, 63, 3, 2, 72)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 1e-2),
        (torch.float16, 1e-2),
    ],
)
def test_it_is_softmax_attention(attend, shape, dtype, tolerance):
    qkv = drawn(*shape, dtype=torch.float64).to(dtype)
    wanted = softmax_attention(qkv)
    found = attend(qkv)
    assert found.shape == (*shape[:2], *shape[3:]) and found.dtype == dtype
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < tolerance
    assert torch.equal(attend(qkv), found)


@each
@pytest.mark.parametrize("shape", [(2, 9, 3, 2, 8), (1, 5, 3, 2, 72)])
def test_gradient_is_the_references(attend, shape):
    qkv = drawn(*shape, dtype=torch.float64).requires_grad_()
    upstream = drawn(*shape[:2], *shape[3:], dtype=torch.float64)
    (found,) = torch.autograd.grad(attend(qkv), qkv, upstream)
    (wanted,) = torch.autograd.grad(op.reference(qkv), qkv, upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@each
def test_gradient_is_that_of_the_finite_differences(attend):
    assert torch.autograd.gradcheck(
        attend, drawn(1, 3, 3, 2, 8, dtype=torch.float64).requires_grad_()
    )


@each
@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 8), (2, 0, 3, 2, 8)])
def test_nothing_gives_nothing(attend, shape):
    qkv = drawn(*shape).requires_grad_()
    attend(qkv).sum().backward()
    assert attend(qkv).shape == (*shape[:2], *shape[3:])
    assert qkv.grad is not None and qkv.grad.shape == shape


@each
def test_strided_input_is_taken_as_it_is(attend):
    wide = drawn(2, 8, 3, 2, 3, 16)  # every third slice of a larger tensor
    qkv = wide[:, :, :, :, 1]
    assert not qkv.is_contiguous()
    torch.testing.assert_close(attend(qkv), attend(qkv.contiguous()))


@each
def test_large_scores_do_not_overflow(attend):
    qkv = (drawn(1, 16, 3, 1, 8) * 1e3).requires_grad_()
    out = attend(qkv)
    out.sum().backward()
    assert torch.isfinite(out).all() and qkv.grad is not None and torch.isfinite(qkv.grad).all()


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("word", ["sdpa", "sdpa_flash"])
def test_nothing_is_copied_but_the_three_gradients_into_one(word):
    attend = op.implementation(word)
    product = drawn(2, 8, 3 * 6 * 8).requires_grad_()  # as a linear layer gives it
    qkv = product.unflatten(-1, (3, 6, 8))
    with Operations() as operations:
        out = attend(qkv)
        flat = out.flatten(2)
        (grad,) = torch.autograd.grad(flat, qkv, torch.ones_like(flat))
    copies = {"clone", "copy_", "_to_copy", "contiguous", "_unsafe_view", "cat", "stack"}
    assert [word for word in operations.names if word in copies] == ["stack"]
    assert out.is_contiguous() and grad.is_contiguous()
    kernels = [word for word in operations.names if "flash_attention" in word]
    assert len(kernels) == 2  # the forward and the backward pass: the mode does see the operations


@pytest.mark.parametrize("word", ["sdpa", "sdpa_flash"])
def test_it_compiles_without_a_break(word):
    attend = op.implementation(word)
    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    gradients = []
    for function in (compiled, attend):
        qkv = drawn(2, 9, 3, 2, 8).requires_grad_()
        function(qkv).square().sum().backward()
        gradients.append(qkv.grad)
    torch.testing.assert_close(*gradients)
    assert all_kernels_enabled()


def test_compiled_code_keeps_the_kernel_that_was_named():
    """The name is in force while torch.compile traces, and the operator of that kernel is in the graph."""
    found = {}
    for name, attend in (("flash", sdpa.attend_flash), ("math", math_only)):
        with Operations() as operations:
            attend(drawn(1, 4, 3, 1, 8).requires_grad_())
        found[name] = any("flash_attention" in word for word in operations.names)
    assert found == {"flash": True, "math": False}
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_compiler

    for attend in (sdpa.attend_flash, math_only):
        torch.compiler.reset()
        backend = aot_autograd(fw_compiler=make_boxed_compiler(keep))
        torch.compile(attend, backend=backend, fullgraph=True)(drawn(1, 4, 3, 1, 8))
    assert [any("flash_attention" in word for word in graph) for graph in graphs] == [True, False]


@pytest.mark.parametrize("attend", [sdpa.attend_cudnn, sdpa.attend_efficient])
def test_a_kernel_that_cannot_run_is_an_error_and_leaves_the_others_alone(attend):
    with pytest.raises(RuntimeError, match="No viable backend"):
        attend(drawn(1, 4, 3, 1, 8))
    assert all_kernels_enabled()


@pytest.mark.parametrize(
    ("attend", "dtype", "free"),
    [
        (sdpa.attend_cudnn, torch.bfloat16, False),
        (sdpa.attend_cudnn, torch.float32, True),
        (sdpa.attend_flash, torch.float16, False),
        (sdpa.attend_flash, torch.float32, True),
        (sdpa.attend_efficient, torch.float32, False),
        (sdpa.attend_efficient, torch.float64, True),
    ],
)
def test_on_a_gpu_a_dtype_that_the_kernel_lacks_goes_where_torch_sends_it(
    monkeypatch, attend, dtype, free
):
    monkeypatch.setattr(sdpa, "attend", lambda qkv: all_kernels_enabled())
    assert attend(types.SimpleNamespace(is_cuda=True, dtype=dtype)) is free


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
    torch.testing.assert_close(xformers_gpu.attend(qkv), sdpa.attend(qkv))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("word", op.BACKENDS)
@pytest.mark.parametrize("tokens", [256, 63])
def test_on_the_gpu_it_is_attention(word, tokens):
    case = Case(torch.device("cuda", 0), torch.bfloat16, 3, tokens, 4, 72)
    backend = op.BACKENDS[word]
    if why_not := backend.unavailable() or backend.unsupported(case):
        pytest.skip(why_not)
    with op.flash_gpu.serving(backend.flash):
        assert measure.deviation(backend.attend, *measure.drawn(case)) < measure.ALLOWED
        assert 0 < measure.milliseconds(backend.attend, case) < 1e3
