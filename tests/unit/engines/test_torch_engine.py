"""`engine: torch`: flat weights, float32 masters of bf16 weights, what is saved, exported, compiled and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from speed_kernels.adamw_ema import flat
from speed_kernels.adamw_ema import op as adamw
from torch import Tensor, nn

from speed_engine import config as configuration
from speed_engine import engines
from speed_engine.conditions import label
from speed_engine.data import Batch, Facts
from speed_engine.data.space import Space
from speed_engine.distributed import Processes
from speed_engine.engines import optimizer
from speed_engine.engines.master_weights import GradientSums, Masters
from speed_engine.engines.torch import Config, TorchEngine
from speed_engine.timesteps.online.policy import ALONE
from speed_engine.training import assembly, metrics
from speed_engine.training.step import DiffusionStep

SHAPE, CLASSES = (1, 8, 8), 10
FACTS = Facts(SHAPE, Space.pixels(1), {"label": label.described(CLASSES, null=True)})
BATCH = 16
ONE = Processes(0, 1, 0, torch.device("cpu"))
PRECISIONS = ("fp32", "bf16", "autocast")
BACKENDS = {"noise": "cpp", "loss": "cpp", "adamw_ema": "cpp"}


def training(*overrides: str, micro: int = BATCH) -> DiffusionStep:
    """A tiny DiT in the engine's hands, and the step that trains it."""
    small = ["model.hidden_size=48", "model.depth=2", "model.num_heads=2", "optim.warmup_steps=0"]
    small += ["engine=torch", f"train.global_batch={BATCH}", f"train.micro_batch={micro}"]
    config = configuration.load("digits_dit_tiny", [*small, *overrides])
    model = assembly.build_model(config, FACTS)
    engine = TorchEngine(
        config.engine,
        model,
        config.optim,
        ONE,
        micro_batch=micro,
        accumulation=BATCH // micro,
        backend=BACKENDS["adamw_ema"],
    )
    table = assembly.build_table(config)
    table.start(BATCH, SHAPE)
    meter = metrics.Meter(ONE.device, table.num_rows)
    return DiffusionStep(config, table, engine, BACKENDS, ALONE, BATCH // micro, meter)


def held(do: DiffusionStep) -> TorchEngine:
    """The engine of a step, with the parts that only this engine has."""
    assert isinstance(do.engine, TorchEngine)
    return do.engine


def batches(first_step: int, micro: int = BATCH) -> Iterator[Batch]:
    """A class is an image with a little noise: learnt in a few steps."""
    classes = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(1))
    step = first_step
    while True:
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        x0 = classes[labels] + 0.1 * torch.randn(BATCH, *SHAPE, generator=generator)
        for start in range(0, BATCH, micro):
            part = slice(start, start + micro)
            yield Batch(x0[part], {"label": labels[part]}, torch.tensor([step, start]))
        step += 1


def run(do: DiffusionStep, first_step: int, num: int, micro: int = BATCH) -> list[float]:
    """`num` steps; the loss of each."""
    source, losses = batches(first_step, micro), []
    for step in range(first_step, first_step + num):
        do(step, source)
        losses.append(do.meter.read(ONE)["loss"])
    return losses


def state(engine: TorchEngine) -> dict[str, Tensor]:
    """Everything that training changes, by name."""
    found = {f"master.{k}": v.detach() for k, v in engine.masters.named()}
    found |= {f"weight.{k}": v for k, v in engine.module.state_dict().items()}
    for name, master in engine.masters.named():
        found |= {f"{key}.{name}": v for key, v in engine.optimizer.state[master].items()}
    return {key: value.clone() for key, value in found.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert not [k for k in one if not torch.equal(one[k], other[k])]


def assert_flat(engine: TorchEngine) -> None:
    """Every kind of tensor is one range of memory, and is so for the optimizer."""
    masters = engine.masters.tensors
    kinds: dict[str, list[Any]] = {"weights": engine.masters.trained, "masters": masters}
    for key in ("exp_avg", "exp_avg_sq", "ema"):
        kinds[key] = [engine.optimizer.state[master][key] for master in masters]
    for name, tensors in kinds.items():
        assert len(flat.joined(tensors)) == 1, name
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1, name
        assert tensors[0].untyped_storage().nbytes() == sum(t.nbytes for t in tensors), name


def test_bf16_weights_learn_what_float32_weights_learn() -> None:
    """50 steps on the same samples, time steps and noise."""
    runs = {name: training(f"engine.precision={name}") for name in PRECISIONS}
    start = {k: v.clone() for k, v in held(runs["fp32"]).masters.named()}
    losses = {name: torch.tensor(run(do, 0, 50)) for name, do in runs.items()}
    assert losses["fp32"][-10:].mean() < 0.7 * losses["fp32"][:10].mean()
    moved = {
        name: torch.cat([(v.detach() - start[k]).flatten() for k, v in held(do).masters.named()])
        for name, do in runs.items()
    }
    for name in ("bf16", "autocast"):
        torch.testing.assert_close(losses[name], losses["fp32"], rtol=0.004, atol=0.0)
        assert (moved[name] - moved["fp32"]).norm() < 0.06 * moved["fp32"].norm()
    engine = held(runs["bf16"])
    rounded = {k: v.bfloat16() for k, v in engine.masters.named()}
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    assert engine.module.pos_embed.dtype == torch.float32
    for name, weight in engine.module.named_parameters():
        assert torch.equal(weight, rounded[name])
    assert any(not torch.equal(v, rounded[k].float()) for k, v in engine.masters.named())
    assert {p.dtype for p in held(runs["autocast"]).module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_and_state_are_flat_and_stay_so(precision: str, tmp_path: Path) -> None:
    do, again = (training(f"engine.precision={precision}") for _ in range(2))
    run(do, 0, 1)
    assert_flat(held(do))
    engines.write(do.engine.state(tmp_path), tmp_path)
    again.engine.load(tmp_path)
    run(again, 1, 1)
    assert_flat(held(again))


def test_one_pass_reads_bf16_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op gets the network's own bf16 gradients; where all of them are flat it gets one tensor of each kind."""
    do = training("engine.precision=bf16")
    run(do, 0, 1)
    seen: list[list[list[Tensor]]] = []

    def spy(update: adamw.Update, grads: list[Tensor], scalars: Tensor) -> None:
        params, *others = update.lists
        seen.append([list(each) for each in (params, grads, *others)])

    monkeypatch.setattr(adamw.Update, "__call__", spy)
    trained = held(do).masters.trained
    grads = flat.side_by_side(trained)
    for parameter, grad in zip(trained, grads, strict=True):
        parameter.grad = grad
    do.engine.step(1e-3)
    (params, gradients, *states, second, copies) = seen.pop()
    assert [len(each) for each in (params, gradients, *states, second, copies)] == [1] * 5 + [0, 1]
    assert gradients[0].dtype == copies[0].dtype == torch.bfloat16
    assert gradients[0].data_ptr() == grads[0].data_ptr()  # read where it lies
    assert copies[0].data_ptr() == trained[0].data_ptr()
    assert all(parameter.grad is None for parameter in trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    do.engine.step(1e-3)
    assert {len(each) for each in seen.pop()} == {len(trained), 0}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("micro", [BATCH, BATCH // 4])
def test_resume_is_bit_exact(precision: str, micro: int, tmp_path: Path) -> None:
    do, again = (training(f"engine.precision={precision}", micro=micro) for _ in range(2))
    run(do, 0, 3, micro)
    engines.write(do.engine.state(tmp_path), tmp_path)
    stored = load_file(tmp_path / "shard-00000.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    again.engine.load(tmp_path)
    assert_equal(held(again).masters.state_dict(), held(do).masters.state_dict())
    assert_equal(state(held(do)), state(held(again)))
    assert run(do, 3, 3, micro) == run(again, 3, 3, micro)
    assert_equal(state(held(do)), state(held(again)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro", [BATCH, BATCH // 2])
def test_a_gradient_that_is_not_finite_changes_nothing(
    precision: str, bad: float, micro: int
) -> None:
    do = training(f"engine.precision={precision}", micro=micro)
    run(do, 0, 2, micro)
    before = state(held(do))
    source = batches(2, micro)
    for index in range(BATCH // micro):
        do.add_gradients(next(source))
        if index == 0:
            tensors = held(do).masters.tensors if held(do).sums else held(do).masters.trained
            tensors[-1].grad.flatten()[0] = bad
        do.engine.step(1e-2)
    assert_equal(state(held(do)), before)
    assert do.engine.num_skipped() == 1
    run(do, 3, 1, micro)
    assert do.engine.num_skipped() == 1
    assert any(not torch.equal(v, before[k]) for k, v in state(held(do)).items())


def test_many_micro_batches_add_up_in_float32() -> None:
    """16 bf16 gradients of a sum that bf16 cannot hold; the buffer is made for accumulation only."""
    assert held(training("engine.precision=bf16")).sums is None
    assert held(training(micro=4)).sums is None
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    masters = Masters(network, torch.bfloat16)
    sums = GradientSums(masters)
    for _ in range(2):  # the second update starts afresh
        for micro in range(16):
            for parameter in network.parameters():
                if parameter is not network[1].bias:
                    value = 256.0 if micro == 0 else 1.0
                    parameter.grad = torch.full_like(parameter, value)
            sums.add()
            assert all(parameter.grad is None for parameter in network.parameters())
        for name, master in masters.named():
            if name == "1.bias":
                assert master.grad is None
            else:
                assert master.grad is not None and master.grad.dtype == torch.float32
                assert torch.equal(master.grad, torch.full_like(master, 256.0 + 15.0))
            master.grad = None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_micro_batches_train_as_the_whole(precision: str) -> None:
    whole, parts = (training(f"engine.precision={precision}", micro=m) for m in (BATCH, 4))
    one, other = torch.tensor(run(whole, 0, 8)), torch.tensor(run(parts, 0, 8, 4))
    rtol = 1e-5 if precision == "fp32" else 2e-3
    torch.testing.assert_close(one, other, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exported_weights(precision: str) -> None:
    do = training(f"engine.precision={precision}")
    run(do, 0, 3)
    engine = held(do)
    plain = assembly.build_model(do.config, FACTS)
    for ema in (False, True):
        weights = engine.weights(ema=ema)
        assert {k: v.shape for k, v in weights.items()} == {
            k: v.shape for k, v in plain.state_dict().items()
        }
        assert {v.dtype for v in weights.values()} == {torch.float32}
        assert torch.equal(weights["pos_embed"], plain.pos_embed)
        for name, master in engine.masters.named():
            wanted = optimizer.ema_of(engine.optimizer, master) if ema else master
            assert torch.equal(weights[name], wanted), name
        plain.load_state_dict(weights)
    assert engine.weights(ema=True).keys() == engine.weights(ema=False).keys()
    assert any(
        not torch.equal(v, engine.weights(ema=False)[k])
        for k, v in engine.weights(ema=True).items()
    )


def test_masters_of_odd_ties_and_frozen_parameters() -> None:
    """Odd sizes go to the end, strides survive, ties share a master, what is frozen is exported unrounded."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = nn.Linear(3, 7)
            self.conv = nn.Conv2d(4, 16, 3).to(memory_format=torch.channels_last)
            self.even = nn.Linear(16, 16)
            self.tied = self.even
            self.even.bias.requires_grad_(False)
            nn.init.normal_(self.even.bias)

    network = Network()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    masters = Masters(network, torch.bfloat16)
    assert [p.numel() for p in masters.trained] == [576, 16, 256, 21, 7]
    for tensors in (masters.tensors, masters.trained):
        assert len(flat.joined(tensors)) == 1
    assert network.conv.weight.stride() == masters.tensors[0].stride() == (36, 1, 12, 4)
    assert network.even.bias.dtype == torch.bfloat16
    saved = {k: v.clone() for k, v in masters.state_dict().items()}
    assert_equal(saved, before)
    other = Masters(Network(), torch.bfloat16)
    other.load_state_dict(saved)
    assert_equal(other.state_dict(), before)
    for a, b in zip(other.module.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(flat.joined(other.tensors)) == len(flat.joined(other.trained)) == 1
    with pytest.raises(ValueError, match="float16"):
        Masters(network, torch.float16)


def test_a_module_may_order_its_memory() -> None:
    network: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    wanted = list(reversed(list(network.parameters())))
    network.memory_order = lambda: wanted
    masters = Masters(network, torch.bfloat16)
    assert [id(p) for p in masters.trained] == [id(p) for p in wanted]
    assert len(flat.joined(wanted)) == 1
    for wrong in (wanted[1:], [*wanted, wanted[0]]):
        network.memory_order = lambda wrong=wrong: wrong
        with pytest.raises(ValueError, match="every parameter once"):
            Masters(network, torch.float32)


def test_compiling_blocks_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    for word, wanted in (("off", []), ("block", ["Block", "Block"]), ("model", ["DiT"])):
        compiled.clear()
        names = held(training(f"engine.compile={word}")).module.state_dict().keys()
        assert [type(module).__name__ for module in compiled] == wanted
        assert names == held(training()).module.state_dict().keys()
    settings = {"micro_batch": 1, "accumulation": 1, "backend": "cpp"}
    with pytest.raises(ValueError, match=r"compile=block .* Linear does not have"):
        TorchEngine(Config(compile="block"), nn.Linear(2, 2), optimizer.Config(), ONE, **settings)
    with pytest.raises(ValidationError, match="'off', 'block' or 'model'"):
        Config.model_validate({"compile": True})


def test_a_compiled_block_is_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    call = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: call(self, backend="aot_eager"))
    plain, compiled = (
        training("engine.precision=bf16"),
        training("engine.precision=bf16", "engine.compile=block"),
    )
    assert run(plain, 0, 2) == pytest.approx(run(compiled, 0, 2), rel=1e-4)
    assert plain.engine.weights(ema=False).keys() == compiled.engine.weights(ema=False).keys()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"engine.precision=bf16 .* engine.precision=autocast"):
        training("engine.precision=bf16", "optim.name=torch_fused")
    run(training("engine.precision=autocast", "optim.name=torch_fused"), 0, 1)
