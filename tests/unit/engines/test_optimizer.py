"""AdamWEMA as a torch optimizer, its peers, and the section `optim`."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from pydantic import ValidationError
from speed_kernels.adamw_ema import flat
from speed_kernels.adamw_ema.layout import Ema, power_gamma
from speed_kernels.adamw_ema.optimizer import AdamWEMA
from torch import nn

from speed_engine.engines import optimizer
from speed_engine.engines.optimizer import reset


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 29), nn.SiLU(), nn.Linear(29, 7), nn.SiLU(), nn.Linear(7, 5))


def set_gradients(*models: nn.Module, step: int) -> None:
    """The same gradients for every model; the values only have to be ordinary."""
    for model in models:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator) * 0.1


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [{k: torch.as_tensor(v).clone() for k, v in s.items()} for s in optimizer.state.values()]


def equal(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_equals_torch_adamw_and_a_lerp(backend: str) -> None:
    """100 steps: weights within 1e-6 of torch.optim.AdamW (lr 1e-3), moments and EMA within 1e-6."""
    ours, theirs = network(), network()
    optimizer = AdamWEMA(
        ours.parameters(), 1e-3, weight_decay=0.1, ema=Ema(decay=0.9), backend=backend
    )
    adamw = torch.optim.AdamW(theirs.parameters(), 1e-3, weight_decay=0.1)
    averages = [param.detach().clone() for param in theirs.parameters()]
    for step in range(100):
        set_gradients(ours, theirs, step=step)
        optimizer.step()
        adamw.step()
        for average, param in zip(averages, theirs.parameters(), strict=True):
            average.lerp_(param.detach(), 0.1)
    for average, a, b in zip(averages, ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.state[a]["ema"], average, rtol=1e-6, atol=1e-6)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[a][key], adamw.state[b][key], rtol=1e-5, atol=1e-7
            )
    assert optimizer.state[next(ours.parameters())]["step"].item() == 100


@pytest.mark.parametrize(
    ("emas", "weights"),
    [
        ([Ema("constant", 0.9)], [lambda t: 0.1]),
        ([Ema("warmup", 0.9)], [lambda t: 1 - min(0.9, t / (9 + t))]),
        (
            [Ema("half_life", half_life=0.8)],  # the ramp-up of 5 % ends after 16 updates
            [lambda t: 1 - 0.5 ** (1 / max(min(0.8, 0.05 * (t - 1)), 1e-8))],
        ),
        (
            [Ema("power", sigma_rel=0.05), Ema("power", sigma_rel=0.10)],
            [lambda t: 1 - (1 - 1 / t) ** 17.97219860, lambda t: 1 - (1 - 1 / t) ** 7.93720390],
        ),
    ],
)
def test_decays_of_the_ema(emas: list[Ema], weights: list) -> None:
    model = network()
    optimizer = AdamWEMA(model.parameters(), 1e-2, ema=emas)
    param = model[0].weight
    averages = [param.detach().double() for _ in emas]
    for t in range(1, 31):
        set_gradients(model, step=t)
        optimizer.step()
        averages = [
            a + w(t) * (param.detach().double() - a) for a, w in zip(averages, weights, strict=True)
        ]
    for which, average in enumerate(averages):
        assert weights[which](7) == pytest.approx(emas[which].weight(7), rel=1e-6)
        got = dict(optimizer.ema_parameters(which))[param]
        torch.testing.assert_close(got.double(), average, rtol=1e-5, atol=1e-6)


def test_power_function_widths() -> None:
    """gamma for sigma_rel 0.05 and 0.10 as published with EDM2."""
    assert power_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    with pytest.raises(ValueError, match="sigma_rel"):
        power_gamma(0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element_anywhere_stops_the_whole_step(bad: float) -> None:
    model = network()
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2:].parameters()), "lr": 1e-2},
    ]
    optimizer = AdamWEMA(groups)
    for step in range(2):
        set_gradients(model, step=step)
        optimizer.step()
    before, weights = snapshot(optimizer), [p.detach().clone() for p in model.parameters()]
    set_gradients(model, step=2)
    model[4].bias.grad[0] = bad
    optimizer.step()
    assert equal(snapshot(optimizer), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert optimizer.skipped == 1
    assert optimizer.applied is not None and optimizer.applied.item() == 0
    set_gradients(model, step=3)
    optimizer.step()
    assert optimizer.skipped == 1 and not equal(snapshot(optimizer), before)


def test_clipping_is_over_all_groups() -> None:
    ours, theirs = network(), network()
    groups = [{"params": list(ours[0].parameters())}, {"params": list(ours[2:].parameters())}]
    optimizer = AdamWEMA(groups, 1e-2, clip_norm=0.1)
    adamw = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.0)
    for step in range(5):
        set_gradients(ours, theirs, step=step)
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
        adamw.step()
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(optimizer.grad_norm, norm)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_shards_decide_together() -> None:
    """A rank whose shard is clean must skip when another rank's is not: the sum of squares is what ranks share."""
    model = network()
    optimizer = AdamWEMA(model.parameters(), reduce_square_sum=lambda s: s.add_(float("nan")))
    set_gradients(model, step=0)
    optimizer.step()
    assert optimizer.skipped == 1


def test_state_dict_round_trip_is_bit_exact(tmp_path) -> None:
    one, two = network(), network(2)
    emas = [Ema("power", sigma_rel=0.05), Ema("power", sigma_rel=0.1)]
    first = AdamWEMA(one.parameters(), 1e-3, ema=emas)
    second = AdamWEMA(two.parameters(), 1e-3, ema=emas)
    for step in range(3):
        set_gradients(one, step=step)
        first.step()
    torch.save({"model": one.state_dict(), "optimizer": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    two.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert equal(snapshot(first), snapshot(second))
    for step in range(3, 6):
        set_gradients(one, two, step=step)
        first.step()
        second.step()
    assert equal(snapshot(first), snapshot(second))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_checkpoint_without_an_ema_is_refused() -> None:
    one, two = network(), network()
    adamw, optimizer = torch.optim.AdamW(one.parameters()), AdamWEMA(two.parameters())
    set_gradients(one, two, step=0)
    adamw.step()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**adamw.state_dict(), "param_groups": groups})
    with pytest.raises(RuntimeError, match="has no ema"):
        optimizer.step()
    optimizer.restart_ema()
    optimizer.step()
    assert optimizer.state[two[0].weight]["step"].item() == 2


def test_flat_parameters_are_one_call_and_give_the_same_bits() -> None:
    plain, flattened = network(), network()
    params = list(flattened.parameters())
    buffer = torch.cat([param.detach().flatten() for param in params])
    grads = torch.zeros_like(buffer)
    start = 0
    for param in params:
        end = start + param.numel()
        param.data, param.grad = buffer[start:end].view_as(param), grads[start:end].view_as(param)
        start = end
    one, two = AdamWEMA(plain.parameters(), 1e-2), AdamWEMA(params, 1e-2)
    for step in range(3):
        set_gradients(plain, step=step)
        for param, other in zip(params, plain.parameters(), strict=True):
            assert param.grad is not None and other.grad is not None
            param.grad.copy_(other.grad)
        one.step()
        two.step()
    assert len(flat.joined(params)) == len(flat.joined([two.state[p]["ema"] for p in params])) == 1
    assert len(flat.joined(list(plain.parameters()))) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), params, strict=True))


def test_channels_last_weights() -> None:
    ours, theirs = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
    theirs.load_state_dict(ours.state_dict())
    ours = ours.to(memory_format=torch.channels_last)
    optimizer, adamw = (
        AdamWEMA(ours.parameters(), 1e-2),
        torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0),
    )
    for step in range(3):
        set_gradients(ours, theirs, step=step)  # contiguous gradients for permuted weights
        optimizer.step()
        adamw.step()
    assert not ours.weight.is_contiguous()
    torch.testing.assert_close(ours.weight.contiguous(), theirs.weight, rtol=1e-6, atol=1e-6)


def test_parameters_that_miss_a_gradient_keep_their_own_count() -> None:
    ours, theirs = network(), network()
    optimizer = AdamWEMA(ours.parameters(), 1e-2)
    adamw = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.0)
    for step in range(6):
        set_gradients(ours, theirs, step=step)
        for model in (ours, theirs):
            if step in (0, 3):
                model[2].weight.grad = None
        optimizer.step()
        adamw.step()
    assert optimizer.state[ours[2].weight]["step"].item() == 4
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_copies_scale_and_swapping() -> None:
    model, plain = network(), network()
    copies = {param: torch.empty_like(param, dtype=torch.bfloat16) for param in model.parameters()}
    optimizer, other = (
        AdamWEMA(model.parameters(), 1e-2, copies=copies),
        AdamWEMA(plain.parameters(), 1e-2),
    )
    assert all(ema is param or torch.equal(ema, param) for param, ema in optimizer.ema_parameters())
    set_gradients(model, plain, step=0)
    for param in model.parameters():
        param.grad.mul_(4.0)
    optimizer.step(grad_scale=torch.tensor(0.25))
    other.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
    assert all(torch.equal(copy, param.bfloat16()) for param, copy in copies.items())
    weights = [param.detach().clone() for param in model.parameters()]
    with optimizer.swapped_ema():
        assert all(torch.equal(param, ema) for param, ema in optimizer.ema_parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    target = network(5)
    optimizer.copy_ema_to(target.parameters())
    assert torch.equal(target[0].weight, optimizer.state[model[0].weight]["ema"])
    with pytest.raises(ValueError, match="EMA number 1"):
        list(optimizer.ema_parameters(1))


def test_reset_forgets_a_step() -> None:
    model = network()
    optimizer = AdamWEMA(model.parameters(), 1e-2)
    fresh = copy.deepcopy(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    reset(optimizer)
    set_gradients(model, fresh, step=0)
    optimizer.step()
    other = AdamWEMA(fresh.parameters(), 1e-2)
    other.step()
    assert equal(snapshot(optimizer), snapshot(other))


def test_refusals() -> None:
    weight = nn.Parameter(torch.zeros(4))
    for change, words in (
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"ema": []}, "0 EMAs"),
        ({"clip_norm": -1.0}, "clip_norm"),
    ):
        with pytest.raises(ValueError, match=words):
            AdamWEMA([weight], **change)
    half = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    half.grad = torch.zeros_like(half)
    with pytest.raises(ValueError, match="updates float32 masters"):
        AdamWEMA([half]).step()
    gappy = nn.Parameter(torch.zeros(8)[::2])
    gappy.grad = torch.zeros(4)
    with pytest.raises(ValueError, match="gaps or overlaps"):
        AdamWEMA([gappy]).step()


def test_the_torch_peer_has_the_same_ema() -> None:
    config = optimizer.Config.model_validate({"ema_kind": "warmup", "lr": 1e-2})
    ours, theirs = network(), network()
    one = optimizer.build(config, ours.parameters(), "auto", clip_norm=0.5)
    two = optimizer.build(
        config.model_copy(update={"name": "torch_fused"}),
        theirs.parameters(),
        "auto",
        clip_norm=0.5,
    )
    for step in range(10):
        set_gradients(ours, theirs, step=step)
        one.step()
        two.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            optimizer.ema_of(one, a), optimizer.ema_of(two, b), rtol=1e-6, atol=1e-6
        )
    again = optimizer.build(
        config.model_copy(update={"name": "torch_fused"}), theirs.parameters(), "auto"
    )
    again.load_state_dict(copy.deepcopy(two.state_dict()))
    assert equal(snapshot(again), snapshot(two))
    assert optimizer.num_skipped(one) == optimizer.num_skipped(two) == 0


def test_peers_that_are_missing(tmp_path, monkeypatch) -> None:
    params = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="needs the DeepSpeed engine"):
        optimizer.build(optimizer.Config(name="deepspeed_fused"), params, "auto")
    with pytest.raises(ValueError, match="CUDA devices only"):
        optimizer.build(
            optimizer.Config(name="deepspeed_fused"),
            params,
            "auto",
            deepspeed_adam=torch.optim.AdamW,
        )
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('pyramid')")
    with pytest.raises(ValueError, match="PyPI's web toolkit"):
        optimizer.build(optimizer.Config(name="apex"), params, "auto")


def test_config() -> None:
    config = optimizer.Config.model_validate(
        {"ema_kind": "power", "ema_sigma_rel": [0.05, 0.1], "warmup_steps": 4}
    )
    assert [ema.sigma_rel for ema in config.emas()] == [0.05, 0.1]
    rates = [optimizer.learning_rate(config, step) for step in range(6)]
    assert rates == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4, 1e-4])
    assert optimizer.learning_rate(optimizer.Config(), 0) == 1e-4
    for wrong in (
        {"ema_decay": 1.0},
        {"lr": -1},
        {"nme": "x"},
        {"ema_sigma_rel": []},
        {"betas": [0.9, 1.0]},
    ):
        with pytest.raises(ValidationError):
            optimizer.Config.model_validate(wrong)
