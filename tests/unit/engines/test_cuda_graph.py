"""The whole step as one CUDA graph: its buffers and its refusals anywhere, its bits on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speed_engine import config as configuration
from speed_engine import engines
from speed_engine.conditions import label
from speed_engine.data import Batch, Facts
from speed_engine.data.space import Space
from speed_engine.distributed import Processes
from speed_engine.engines import cuda_graph
from speed_engine.engines.cuda_graph import WARM_UP, CapturedStep, refuse_what_cannot_be_captured
from speed_engine.engines.torch import TorchEngine
from speed_engine.timesteps.online.policy import ALONE
from speed_engine.training import assembly, metrics
from speed_engine.training.step import DiffusionStep

SHAPE, CLASSES = (1, 8, 8), 10
FACTS = Facts(SHAPE, Space.pixels(1), {"label": label.described(CLASSES, null=True)})
BATCH = 8
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class FakeRecorder:
    """A graph for the CPU: recording runs the work and undoes what it did to `tensors()`; a replay runs it again and
    copies its results to where those of the recording lie."""

    def __init__(self, tensors: Callable[[], list[Tensor]]) -> None:
        self.tensors = tensors
        self.eager_calls = self.recordings = self.replays = 0

    def eagerly(self, work: Callable[[], Any]) -> Any:
        self.eager_calls += 1
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recordings += 1
        kept = [(tensor, tensor.detach().clone()) for tensor in self.tensors()]
        result = work()
        with torch.no_grad():
            for tensor, old in kept:
                tensor.copy_(old)

        def replay() -> None:
            self.replays += 1
            for place, value in zip(result, work(), strict=True):
                place.copy_(value)

        return result, replay


def training(device: str, *overrides: str) -> DiffusionStep:
    """A tiny DiT on `device`, trained eagerly."""
    small = ["model.hidden_size=48", "model.depth=2", "model.num_heads=2", "engine=torch"]
    small += [f"train.global_batch={BATCH}", "optim.warmup_steps=20", "optim.clip=1.0"]
    config = configuration.load("digits_dit_tiny", [*small, *overrides])
    where = torch.device(device)
    backend = "triton" if device == "cuda" else "cpp"
    backends = dict.fromkeys(("noise", "loss", "adamw_ema"), backend)
    engine = TorchEngine(
        config.engine,
        assembly.build_model(config, FACTS),
        config.optim,
        Processes(0, 1, 0, where),
        micro_batch=BATCH,
        accumulation=1,
        backend=backend,
    )
    table = assembly.build_table(config).to(where)
    table.start(BATCH, SHAPE)
    meter = metrics.Meter(where, table.num_rows)
    return DiffusionStep(config, table, engine, backends, ALONE, 1, meter)


def held(do: DiffusionStep) -> TorchEngine:
    """The engine of a step, with the parts that only this engine has."""
    assert isinstance(do.engine, TorchEngine)
    return do.engine


def batches(device: str) -> Iterator[Batch]:
    step = 0
    while True:
        generator = torch.Generator().manual_seed(step)
        x0 = torch.randn(BATCH, *SHAPE, generator=generator).to(device)
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator).to(device)
        yield Batch(x0, {"label": labels}, torch.tensor([step, 0]).to(device))
        step += 1


def run(do: DiffusionStep, num: int, device: str) -> list[float]:
    """The loss of each of `num` steps, read from the meter as the loop does."""
    source, losses = batches(device), []
    for step in range(num):
        do(step, source)
        losses.append(do.meter.read(held(do).processes)["loss"])
    return losses


def changed_by_training(do: DiffusionStep) -> list[Tensor]:
    engine: Any = held(do)
    found = [*engine.masters.tensors, *engine.module.parameters(), do.meter.sums]
    found += [do.meter.bucket_sums, engine.optimizer._skipped]
    steps: dict[int, Tensor] = {}
    for state in engine.optimizer.state.values():
        found += [state["exp_avg"], state["exp_avg_sq"], state["ema"]]
        steps[id(state["step"])] = state["step"]
    return [*found, *steps.values()]


def as_graph(do: DiffusionStep, device: str) -> tuple[DiffusionStep, FakeRecorder | None]:
    """The captured step; on the CPU with the fake graph."""
    if device == "cuda":
        return do.captured(), None
    fake, original = FakeRecorder(lambda: changed_by_training(do)), held(do).captured
    engine: Any = do.engine
    engine.captured = lambda work: original(work, recorder=fake)
    return do.captured(), fake


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("device", DEVICES)
def test_captured_steps_equal_eager_steps_bit_for_bit(device: str, precision: str) -> None:
    """Three replays after the warm-up, each with its own batch, address and learning rate."""
    eager, graph = (training(device, f"engine.precision={precision}") for _ in range(2))
    do, fake = as_graph(graph, device)
    num = WARM_UP + 3
    assert run(eager, num, device) == run(do, num, device)
    for one, other in zip(changed_by_training(eager), changed_by_training(graph), strict=True):
        assert torch.equal(one, other)
    if fake is not None:
        assert (fake.eager_calls, fake.recordings, fake.replays) == (WARM_UP, 1, 3)
    assert all(p.grad is None for p in held(graph).module.parameters())
    (group,) = held(graph).optimizer.param_groups
    assert group["lr"] == pytest.approx(2e-3 * num / 20)


@pytest.mark.parametrize("device", DEVICES)
def test_a_method_that_learns_from_losses_sees_those_of_replays(device: str) -> None:
    """InfoNoise's table is refreshed between replays, in place, from what they observed."""
    options = ("timesteps.kind=infonoise", "timesteps.every=2", "timesteps.warmup_steps=2")
    eager, graph = (training(device, *options) for _ in range(2))
    before = graph.table.density.clone()
    do, _ = as_graph(graph, device)
    num = WARM_UP + 5
    assert run(eager, num, device) == run(do, num, device)
    assert not torch.equal(before, graph.table.density)
    assert torch.equal(eager.table.density, graph.table.density)
    assert torch.equal(eager.table.cdf_T, graph.table.cdf_T)


def test_a_gradient_that_is_not_finite_is_skipped_in_a_replay() -> None:
    do, _ = as_graph(graph := training("cpu"), "cpu")
    source = batches("cpu")
    for step in range(WARM_UP + 1):
        do(step, source)
    before = [tensor.clone() for tensor in held(graph).masters.tensors]
    bad = next(source)
    bad.x0.view(-1)[0] = float("inf")
    do(WARM_UP + 1, iter([bad]))
    assert graph.engine.num_skipped() == 1
    for old, tensor in zip(before, held(graph).masters.tensors, strict=True):
        assert torch.equal(old, tensor)


def test_the_buffers() -> None:
    """Inputs are copied to the same place at every call; the result lies where the recording left it."""
    addresses: list[int] = []
    total = torch.zeros(3)

    def work(inputs: Mapping[str, Tensor]) -> tuple[Tensor]:
        x = inputs["x"]
        addresses.append(x.data_ptr())
        total.add_(x)
        return (2 * x,)

    step = CapturedStep(work, FakeRecorder(lambda: [total]))
    results = []
    for call in range(WARM_UP + 3):
        x = torch.full((3,), float(call))
        (result,) = step({"x": x})
        assert torch.equal(result, 2 * x)
        assert (step.replay is not None) == (call >= WARM_UP)
        results.append(result)
    assert len(set(addresses)) == 1
    assert all(result is results[-1] for result in results[WARM_UP:])
    assert torch.equal(total, torch.full((3,), float(sum(range(WARM_UP + 3)))))
    three = torch.zeros(3)
    for other in (
        {"x": torch.zeros(4)},
        {"x": three.double()},
        {"y": three},
        {},
        {"x": three, "y": three},
    ):
        with pytest.raises(ValueError, match="inputs like those it was captured with"):
            step(other)


def test_state_is_loaded_before_the_capture(tmp_path: Path) -> None:
    do, _ = as_graph(graph := training("cpu"), "cpu")
    source = batches("cpu")
    for step in range(WARM_UP):
        do(step, source)
    engines.write(graph.engine.state(tmp_path), tmp_path)
    graph.engine.load(tmp_path)
    do(WARM_UP, source)
    with pytest.raises(RuntimeError, match="load before it runs"):
        graph.engine.load(tmp_path)


def test_what_cannot_be_captured_is_refused_in_one_sentence(monkeypatch) -> None:
    gpu = torch.device("cuda", 0)
    refuse = refuse_what_cannot_be_captured
    refuse(gpu, 1, 1, "adamw_ema", True)
    for arguments, words in (
        ((torch.device("cpu"), 1, 1, "adamw_ema", False), "needs a CUDA device.* on cpu"),
        ((gpu, 2, 1, "adamw_ema", False), "one process, and this run has 2"),
        ((gpu, 1, 4, "adamw_ema", False), "4 micro-batches.*train.micro_batch"),
        ((gpu, 1, 1, "torch_fused", False), "optim.name=torch_fused.*optim.name=adamw_ema"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            refuse(*arguments)
        assert "engine.cuda_graph=false" in str(error.value)
    monkeypatch.setattr(cuda_graph, "_inductor_makes_graphs", lambda: True)
    refuse(gpu, 1, 1, "adamw_ema", False)
    with pytest.raises(ValueError, match="TORCHINDUCTOR_CUDAGRAPHS"):
        refuse(gpu, 1, 1, "adamw_ema", True)


def test_the_engine_and_the_loop_refuse() -> None:
    with pytest.raises(ValueError, match=r"engine.cuda_graph=true needs a CUDA device"):
        training("cpu", "engine.cuda_graph=true")
    with pytest.raises(ValueError, match=r"timesteps.kind=adaptive .* engine.cuda_graph=false"):
        training("cpu", "timesteps=adaptive").captured()
    torch_fused = training("cpu", "optim.name=torch_fused")
    with pytest.raises(AssertionError, match="refused"):
        torch_fused.captured()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a capture needs a CUDA device")
def test_work_that_waits_for_the_device_is_refused_when_it_is_captured() -> None:
    step = CapturedStep(lambda x: x.sum().item(), cuda_graph.CudaRecorder(torch.device("cuda")))
    x = torch.ones(3, device="cuda")
    for _ in range(WARM_UP):
        assert step(x) == 3.0
    with pytest.raises(ValueError, match="cannot be captured"):
        step(x)
