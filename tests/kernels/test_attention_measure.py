"""Attention: the check and the clock that every implementation passes before it can be chosen."""

from __future__ import annotations

import contextlib

import pytest
import torch
from speed_kernels.attention import measure, op, sdpa
from speed_kernels.attention.interface import Case

CASE = Case(torch.device("cpu"), torch.bfloat16, 2, 17, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 130])
def test_attention_passes_the_check_before_it_is_timed(dtype, tokens):
    case = CASE._replace(dtype=dtype, tokens=tokens, head_dim=72)
    state = torch.get_rng_state()
    qkv, upstream = measure.drawn(case)
    assert qkv.shape == case.shape and qkv.dtype == dtype and qkv.requires_grad
    for attend in (sdpa.attend, sdpa.attend_flash, op.reference):
        assert measure.deviation(attend, qkv, upstream) < measure.ALLOWED / 3
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_attention_does_not_pass_the_check():
    qkv, upstream = measure.drawn(CASE._replace(tokens=130))

    def causal(qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=True).transpose(1, 2)

    def one_wrong_token(qkv):
        out = sdpa.attend(qkv)
        return torch.cat([out[:, :-1], 2 * out[:, -1:]], 1)

    def undefined_token(qkv):
        return torch.cat([sdpa.attend(qkv)[:, :-1], qkv[:, -1:, 0] * float("nan")], 1)

    def wrong_scale(qkv):
        return sdpa.attend(qkv * torch.tensor([1.3, 1, 1])[:, None, None].to(qkv.dtype))

    def wrong_gradient(qkv):
        return sdpa.attend(torch.cat([qkv[:, :, :1].detach(), qkv[:, :, 1:]], 2))

    for attend in (causal, one_wrong_token, undefined_token, wrong_scale, wrong_gradient):
        assert not measure.deviation(attend, qkv, upstream) < measure.ALLOWED, attend


class Clock:
    """Stands in for torch.cuda.Event; `times` are what passes between the two events of a run."""

    times: list[float]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Clock) -> float:
        return self.times.pop(0)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(measure, "FILLER_SIZE", 8)
    Clock.times = [100.0] * measure.WARM_UP + [3.0, 1.0, 2.0, 50.0, 2.0, 2.5, 1.5, 2.0, 3.0, 2.0]
    return Clock


def test_the_time_is_the_median_after_the_warm_up(clock):
    runs = []

    def attend(qkv):
        assert torch.is_grad_enabled()
        runs.append(qkv.shape)
        return sdpa.attend(qkv)

    with torch.inference_mode():
        assert measure.milliseconds(attend, CASE) == 2.0
    assert not clock.times and runs == [CASE.shape] * 16  # the check, 5 and 10


def test_what_is_wrong_is_not_timed(clock):
    with pytest.raises(RuntimeError, match="its result is wrong here"):
        measure.milliseconds(lambda qkv: qkv[:, :, 0], CASE)
    assert len(clock.times) == 15
