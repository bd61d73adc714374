"""The dropout op against the generator's own reference, word by word."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_kernels import philox
from speed_kernels.dropout import cpp_cpu
from speed_kernels.dropout.op import MAX_LAYER, dropout, dropout_op, sample_inputs, threshold
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    BACKENDS = [("triton", "cpu")]
else:
    BACKENDS = [("reference", "cpu"), ("cpp", "cpu")]
    if torch.cuda.is_available():
        BACKENDS += [("triton", "cuda")]
CASES = range(len(list(sample_inputs())))
every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def address(seed: int = 3, step: int = 17, slot: int = 40) -> Tensor:
    return torch.tensor([seed, step, slot])


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def kept(x: Tensor, at_3: Tensor, layer: int, p: float) -> Tensor:
    """Which elements stay, from `philox.random_bits` alone."""
    seed, step, slot = at_3.tolist()
    batch, channels, height, width = x.shape
    slot_B, num = torch.arange(batch) + slot, channels * height * width
    stream = philox.STREAM_DROPOUT + 256 * layer
    word_BN = philox.random_bits(seed, step, slot_B, stream, -(-num // 4)).flatten(1)[:, :num]
    word_BHWC = word_BN.view(batch, height, width, channels)
    return word_BHWC.permute(0, 3, 1, 2) >= round(p * 2**32)


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_drops_what_the_words_say(backend: str, device: str, case: int) -> None:
    x, at_3, layer, p, _ = list(sample_inputs())[case]
    leaf = x.to(device).requires_grad_()
    y = dropout(leaf, at_3.to(device), layer=layer, p=p, backend=backend)
    d_y = image(*x.shape).to(x.dtype)
    (d_x,) = torch.autograd.grad(y, leaf, d_y.to(device))
    stays = kept(x, at_3, layer, p) if x.numel() else torch.ones_like(x, dtype=torch.bool)
    for given, got in ((x, y), (d_y, d_x)):
        exact = torch.where(stays, given.double() / (1 - p), 0.0)
        # One product in float32, rounded once; the interpreter cuts bits off where a GPU rounds.
        unit = torch.finfo(x.dtype).eps * (2 if INTERPRETING else 1)
        assert got.dtype == x.dtype and got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got.cpu().double(), exact, rtol=unit, atol=0.0)
        assert torch.equal(got.cpu() != 0, stays & (given != 0))


@every_backend
@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (3, 7, 13, 11)])
def test_any_split_of_a_batch_drops_the_same(
    backend: str, device: str, shape: tuple[int, ...]
) -> None:
    x, at_3 = image(*shape).to(device), address(seed=2**62 + 5).to(device)
    whole = dropout(x, at_3, layer=2, p=0.4, backend=backend)
    for sample in range(shape[0]):
        at_3[2] = 40 + sample
        alone = dropout(x[sample : sample + 1], at_3, layer=2, p=0.4, backend=backend)
        assert torch.equal(alone, whole[sample : sample + 1])


@every_backend
def test_the_share_and_the_independence(backend: str, device: str) -> None:
    shape = (4, 32, 16, 16) if not INTERPRETING else (2, 16, 8, 8)
    x, p = torch.ones(shape, device=device), 0.3
    num = x.numel()
    first, *others = (
        dropout(x, at_3.to(device), layer=layer, p=p, backend=backend).cpu() == 0
        for at_3, layer in (
            (address(), 0),
            (address(), 1),
            (address(step=18), 0),
            (address(seed=4), 0),
            (address(slot=44), 0),
        )
    )
    for mask in (first, *others):
        assert abs(mask.float().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / num)
    for mask in others:  # both dropped: p^2 of them
        both = (first & mask).float().mean().item()
        assert abs(both - p * p) < 4 * math.sqrt(p * p / num)


@every_backend
def test_strides_do_not_matter_and_nothing_is_stored_but_the_address(
    backend: str, device: str
) -> None:
    x, at_3 = image(2, 8, 6, 4).to(device).requires_grad_(), address().to(device)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = dropout(x, at_3, layer=0, p=0.5, backend=backend)
    assert [tensor.data_ptr() for tensor in saved] == [at_3.data_ptr()]
    turned = x.detach().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(dropout(turned, at_3, layer=0, p=0.5, backend=backend), y)


@pytest.mark.skipif(INTERPRETING, reason="C++")
def test_every_instruction_set_and_number_of_threads(
    isa: str, monkeypatch: pytest.MonkeyPatch, on_threads: Callable[..., list[Any]]
) -> None:
    function = functools.partial(cpp_cpu.library_function, isa)
    monkeypatch.setattr(cpp_cpu, "library_function", function)
    for case in CASES:
        test_drops_what_the_words_say("cpp", "cpu", case)
    x = image(3, 48, 33, 31)
    found = on_threads(lambda: dropout(x, address(), layer=1, p=0.2, backend="cpp"))
    expected = dropout(x, address(), layer=1, p=0.2, backend="reference")
    assert all(torch.equal(each, expected) for each in found)


def test_the_threshold_is_a_word() -> None:
    assert (threshold(0.0), threshold(0.5)) == (0, 2**31)
    assert threshold(1 - 2**-40) == 2**32 - 1


@pytest.mark.skipif(INTERPRETING, reason="torch's side is the same for all backends")
@every_backend
@pytest.mark.parametrize("case", CASES)
def test_opcheck(backend: str, device: str, case: int) -> None:
    x, at_3, *options = list(sample_inputs(device, backend))[case]
    torch.library.opcheck(dropout_op, (x.clone().requires_grad_(), at_3, *options))


@pytest.mark.skipif(INTERPRETING, reason="the same for all backends")
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("x_BCHW is torch.float64", {"x_BCHW": torch.zeros(1, 4, 2, 2, dtype=torch.float64)}),
        (r"x_BCHW has the shape \(3,\)", {"x_BCHW": torch.zeros(3)}),
        (r"address_3 is torch.int64 \(2,\)", {"address_3": torch.tensor([1, 2])}),
        ("address_3 is on meta", {"address_3": address().to("meta")}),
        ("layer=-1 is outside", {"layer": -1}),
        ("layer=16777216 is outside", {"layer": MAX_LAYER + 1}),
        (r"p=1.0 is outside \[0, 1\)", {"p": 1.0}),
    ],
)
def test_wrong_arguments_are_refused(message: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "x_BCHW": image(1, 4, 2, 2),
        "address_3": address(),
        "layer": 0,
        "p": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        dropout(**arguments | change, backend="cpp")
