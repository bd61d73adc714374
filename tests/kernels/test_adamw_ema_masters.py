"""AdamWEMA over float32 masters whose gradients are those of their bf16 copies; flat memory for both."""

from __future__ import annotations

import pytest
import torch
from speed_kernels import contract
from speed_kernels.adamw_ema import flat, op
from speed_kernels.adamw_ema.layout import Ema
from speed_kernels.adamw_ema.optimizer import AdamWEMA
from torch import Tensor, nn

SIZES = ((5, 16), (33,), (1,), (7, 3))
BACKENDS = [
    pytest.param(word, device, id=f"{word}-{device}")
    for device in ("cpu", "cuda")
    for word in contract.backends(op.NAME)
    if (device == "cpu" or torch.cuda.is_available())
    and contract.unavailable(op.NAME, word, device) is None
]


def masters_and_copies(device: str = "cpu") -> tuple[list[Tensor], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size, generator=generator).to(device) for size in SIZES]
    masters = flat.side_by_side(drawn)
    copies = flat.side_by_side(masters, torch.bfloat16)
    return masters, [nn.Parameter(copy) for copy in copies]


def gradients(step: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [(torch.randn(size, generator=generator) * 0.1).to(device).bfloat16() for size in SIZES]


@pytest.mark.parametrize("flat_gradients", [False, True])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_equals_training_with_the_gradients_upcast(
    backend: str, device: str, flat_gradients: bool
) -> None:
    """Bit for bit the float32 training that is given the same gradients, with clipping and two EMAs."""
    numbers = {"weight_decay": 0.1, "clip_norm": 0.5, "backend": backend}
    numbers["ema"] = [Ema("warmup", 0.9), Ema("power")]
    masters, copies = masters_and_copies(device)
    plain = [master.clone() for master in masters]
    ours = AdamWEMA(masters, 1e-2, copies=dict(zip(masters, copies, strict=True)), **numbers)
    theirs = AdamWEMA(plain, 1e-2, **numbers)
    for step in range(5):
        grads = gradients(step, device)
        if flat_gradients:
            grads = flat.side_by_side(grads)
        for copy, param, grad in zip(copies, plain, grads, strict=True):
            copy.grad, param.grad = grad, grad.float()
        ours.step()
        theirs.step()
        ours.zero_grad()
        assert all(copy.grad is None for copy in copies)
    for master, copy, param in zip(masters, copies, plain, strict=True):
        # The sum of squares of many tensors and of one are added in another order.
        exact = {"rtol": 1e-6, "atol": 1e-7} if flat_gradients else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(master, param, **exact)
        assert torch.equal(copy, master.bfloat16())
        for key in ("exp_avg", "exp_avg_sq", "ema", "ema2"):
            torch.testing.assert_close(ours.state[master][key], theirs.state[param][key], **exact)


def test_a_gradient_of_its_own_comes_first() -> None:
    """float32 sums of many micro-batches are put on the masters; then the copies' gradients do not count."""
    masters, copies = masters_and_copies()
    optimizer = AdamWEMA(masters, 1e-2, copies=dict(zip(masters, copies, strict=True)))
    for master, copy in zip(masters, copies, strict=True):
        master.grad, copy.grad = torch.ones_like(master), torch.full_like(copy, float("nan"))
    before = [master.clone() for master in masters]
    optimizer.step()
    assert optimizer.skipped == 0
    for old, master in zip(before, masters, strict=True):
        torch.testing.assert_close(master, old - 1e-2, rtol=1e-6, atol=1e-6)
    optimizer.zero_grad(set_to_none=False)
    for tensor in (*masters, *copies):
        assert tensor.grad is not None and not tensor.grad.any()
    optimizer.zero_grad()
    assert all(tensor.grad is None for tensor in (*masters, *copies))


def test_gradients_of_two_dtypes_are_refused() -> None:
    masters, copies = masters_and_copies()
    optimizer = AdamWEMA(masters, 1e-2, copies=dict(zip(masters, copies, strict=True)))
    for copy in copies:
        copy.grad = torch.ones_like(copy)
    masters[0].grad = torch.ones_like(masters[0])
    before = [master.clone() for master in masters]
    with pytest.raises(ValueError, match="one dtype"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, masters, strict=True))


def test_a_gradient_that_is_not_finite_leaves_masters_and_copies() -> None:
    masters, copies = masters_and_copies()
    optimizer = AdamWEMA(masters, 1e-2, copies=dict(zip(masters, copies, strict=True)))
    for copy in copies:
        copy.grad = torch.ones_like(copy)
    copies[2].grad = torch.full_like(copies[2], float("inf"))
    before = [tensor.detach().clone() for tensor in (*masters, *copies)]
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, (*masters, *copies), strict=True))


def test_copies_that_miss_a_gradient_keep_their_own_count() -> None:
    masters, copies = masters_and_copies()
    optimizer = AdamWEMA(masters, 1e-2, copies=dict(zip(masters, copies, strict=True)))
    for step in range(4):
        for index, (copy, grad) in enumerate(zip(copies, gradients(step), strict=True)):
            copy.grad = None if index == 1 and step in (0, 2) else grad
        optimizer.step()
    assert [optimizer.state[master]["step"].item() for master in masters] == [4, 2, 4, 4]
    for master, copy in zip(masters, copies, strict=True):
        assert torch.equal(copy, master.bfloat16())


def test_swapping_in_the_ema_reaches_the_copies() -> None:
    masters, copies = masters_and_copies()
    optimizer = AdamWEMA(masters, 1e-2, copies=dict(zip(masters, copies, strict=True)))
    for copy, grad in zip(copies, gradients(0), strict=True):
        copy.grad = grad
    optimizer.step()
    before = [copy.detach().clone() for copy in copies]
    with optimizer.swapped_ema():
        for copy, (_, ema) in zip(copies, optimizer.ema_parameters(), strict=True):
            assert torch.equal(copy, ema.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))


def test_a_copy_of_another_layout_is_refused() -> None:
    master, copy = torch.zeros(4, 6), nn.Parameter(torch.zeros(6, 4).bfloat16().t())
    copy.grad = torch.ones_like(copy)
    with pytest.raises(ValueError, match="laid out like"):
        AdamWEMA([master], copies={master: copy}).step()


def test_side_by_side() -> None:
    """One range of memory; shapes, strides and values kept; gaps closed."""
    permuted = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    gappy = torch.randn(8, 3)[::2]
    tensors = [torch.randn(7), permuted, gappy, torch.tensor(3.0)]
    parts = flat.side_by_side(tensors)
    assert len(flat.joined(parts)) == 1 and flat.joined(parts)[0].numel() == 7 + 120 + 12 + 1
    for part, tensor in zip(parts, tensors, strict=True):
        assert torch.equal(part, tensor)
    assert parts[1].stride() == permuted.stride() and parts[2].is_contiguous()
    rounded = flat.side_by_side(tensors, torch.bfloat16)
    for part, tensor in zip(rounded, tensors, strict=True):
        assert torch.equal(part, tensor.bfloat16())
    assert flat.side_by_side([]) == []
