"""The benchmarks themselves: paired ratios, gates that really refuse, and a report that says no more than it may."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from speed_kernels import contract
from speed_kernels.noise import reference as noise_reference

from benchmarks.gate import device as gate_device
from benchmarks.gate import numerics as gate_numerics
from benchmarks.harness import counts as gpu_counts
from benchmarks.harness import environment as conditions
from benchmarks.harness import measure as harness
from benchmarks.harness.measure import Case, GateError, Measured, Provider, Settings, Unavailable
from benchmarks.ops.adamw_ema import gate as adamw_gate
from benchmarks.ops.adamw_ema import providers as adamw_providers
from benchmarks.ops.diffusion_step import gate as diffusion_gate
from benchmarks.ops.diffusion_step import providers as diffusion_providers
from benchmarks.ops.diffusion_step.formulas import host_tables, packed_rows, uniform_cdf
from benchmarks.ops.diffusion_step.providers import Problem, Result
from benchmarks.report import page as report

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, torch.float32, True, seconds=0.0, min_rounds=3, max_rounds=5)
CASE = Case("diffusion_step", "latents32-b32", "2x2", "float32", num_bytes=8000)


# ------------------------------------------------------------------ ratios and rounds


def test_a_ratio_pairs_the_rounds() -> None:
    """The machine is ten times slower in the last rounds; the ratio of medians would be 20 or 0.2."""
    ours = [1.0, 1.0, 1.0, 10.0, 10.0]
    baseline = [2.0, 2.0, 4.0, 20.0, 20.0]
    ratio = harness.paired_ratio(baseline, ours)
    assert (ratio.median, ratio.q1, ratio.q3, ratio.rounds) == (2.0, 2.0, 2.0, 5)
    spread = harness.paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (spread.q1, spread.median, spread.q3) == (2.0, 3.0, 4.0)
    assert harness.paired_ratio([3.0], [2.0]).q3 == 1.5


@pytest.mark.parametrize(("baseline", "ours"), [([1.0, 2.0], [1.0]), ([], [])])
def test_rounds_that_do_not_pair_are_refused(baseline: list[float], ours: list[float]) -> None:
    with pytest.raises(ValueError, match="do not pair"):
        harness.paired_ratio(baseline, ours)


def test_everybody_takes_every_place_equally_often() -> None:
    names = ["a", "b", "c"]
    rounds = [harness.order_of(names, index) for index in range(6)]
    for place in range(3):
        column = [order[place] for order in rounds]
        assert sorted(column) == ["a", "a", "b", "b", "c", "c"]


def test_rounds_alternate_and_end() -> None:
    calls: list[str] = []
    now = iter(range(1000))

    def stopwatch(call: Callable[[], object]) -> float:
        call()
        return float(next(now))

    providers = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = harness.alternate(
        providers, stopwatch, seconds=0.0, min_rounds=3, max_rounds=9, warmups=1
    )
    assert calls == ["a", "b", "a", "b", "b", "a", "b", "a"]  # one warm-up each, then three rounds
    assert [len(each) for each in times.values()] == [3, 3]
    endless = harness.alternate(providers, stopwatch, seconds=1e9, min_rounds=1, max_rounds=4)
    assert [len(each) for each in endless.values()] == [4, 4]


def test_the_replayed_clock_gives_what_was_measured() -> None:
    clock, seen = harness.ReplayClock(), []
    durations = [0.5, 0.25, 3.0]
    call = clock.replay(durations)
    for _ in durations:
        start = clock()
        call()
        seen.append(clock() - start)
    assert seen == durations


# ------------------------------------------------------------------ gates


def measure(monkeypatch: pytest.MonkeyPatch, **builders: Callable[[], Provider]) -> Measured:
    monkeypatch.setattr(harness, "COPY_ELEMENTS", {"cpu": 1024})
    return harness.measure(CASE, builders, SETTINGS, {"torch": "x"})


def test_a_red_provider_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def refuse() -> None:
        raise GateError("loss 1, in float64 2")

    def absent() -> Provider:
        raise Unavailable("not installed")

    measured = measure(
        monkeypatch,
        reference=lambda: Provider(lambda: None, lambda: timed.append("reference")),
        eager=lambda: Provider(refuse, lambda: timed.append("eager")),
        apex=absent,
        ours=lambda: Provider(lambda: None, lambda: timed.append("ours"), facts={"backend": "cpp"}),
    )
    assert set(timed) == {"reference", "ours"}
    assert measured.red == {"eager": "loss 1, in float64 2"}
    row = measured.row("ours")
    assert row["not_measured"] == {"apex": "not installed", "eager": "correctness gate red"}
    assert (
        "ratio_vs_eager" not in row and row["ratio_vs_reference_q1"] <= row["ratio_vs_reference_q3"]
    )
    assert row["rounds"] == 3 and row["backend"] == "cpp" and row["quick"]
    assert "ratio_vs_reference" not in measured.row("reference")


def test_the_floor_counts_bytes_at_the_copy_of_the_same_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "COPY_ELEMENTS", {"cpu": 1000})
    times = {"ours": [4.0, 2.0, 2.0], "eager": [4.0, 4.0, 8.0], harness.COPY: [1.0, 2.0, 1.0]}
    row = Measured(CASE, CPU, {}, times).row("ours")
    assert row["copy_gb_per_s"] == pytest.approx(
        8000 / 1e9
    )  # 1000 floats, read and written, in 1 s
    assert row["floor_fraction"] == pytest.approx(0.5)
    assert row["ratio_vs_eager"] == 2.0


def broken_step(
    change: Callable[[Result, Problem], Result],
) -> tuple[Problem, Callable[[], Result]]:
    problem = diffusion_providers.make_problem((8, 4, 16, 16), CPU, torch.float32, seed=1)
    step, _ = diffusion_providers.eager(problem)
    return problem, lambda: change(step(), problem)


def scaled_v(result: Result, problem: Problem) -> Result:
    grad = result.grad.clone()
    grad[:, 4:] *= 1.01
    return Result(result.loss, grad, result.x_t, result.t_B)


BREAKAGES: dict[str, tuple[Callable[[Result, Problem], Result], str]] = {
    "loss": (lambda r, p: Result(r.loss * 1.001, r.grad, r.x_t, r.t_B), "loss"),
    "gradient": (scaled_v, "gradient by v"),
    "noise": (
        lambda r, p: Result(r.loss, r.grad, p.x0 + 1.2 * (r.x_t - p.x0), r.t_B),
        "mean of the noise",
    ),
    "time steps": (lambda r, p: Result(r.loss, r.grad, r.x_t, r.t_B + 1000), "t outside"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_gate_of_the_diffusion_step_can_be_red(name: str) -> None:
    change, message = BREAKAGES[name]
    torch.manual_seed(0)
    with pytest.raises(GateError, match=message):
        diffusion_gate.check(*broken_step(change))


@pytest.mark.parametrize("skewed", [False, True])
def test_reference_and_eager_compute_the_same_loss(skewed: bool) -> None:
    torch.manual_seed(0)
    problem = diffusion_providers.make_problem((8, 3, 6, 5), CPU, torch.float32, skewed, seed=2)
    diffusion_gate.check(problem, diffusion_providers.reference(problem))
    diffusion_gate.check(problem, diffusion_providers.eager(problem)[0])


def test_the_benchmark_and_the_engine_have_one_recipe() -> None:
    from speed_engine.objectives import epsilon
    from speed_engine.schedules import linear
    from speed_engine.step_table import build_step_table
    from speed_engine.timesteps import uniform

    table = build_step_table(
        linear.Config.model_validate({}), epsilon.Config(), uniform.Config.model_validate({}), True
    )
    torch.testing.assert_close(packed_rows(host_tables()), table.rows_T8, rtol=1e-6, atol=0)
    assert int((uniform_cdf(1000) - table.cdf_T).abs().max()) <= 1


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("build", [adamw_providers.reference, adamw_providers.eager])
def test_the_optimizers_agree(build: Callable[..., Any], mixed: bool) -> None:
    adamw_gate.check(build, CPU, "list", mixed)


def test_the_gate_of_the_optimizer_can_be_red() -> None:
    def lazy(problem: adamw_providers.Problem) -> adamw_providers.Stepper:
        stepper = adamw_providers.eager(problem)
        steps = iter(range(100))
        return adamw_providers.Stepper(
            lambda: stepper.step() if next(steps) != 1 else None, stepper.emas, {}
        )

    with pytest.raises(GateError, match="weight 0 is off"):
        adamw_gate.check(lazy, CPU, "flat", mixed=False)


def test_the_gate_of_the_kernels_sees_one_wrong_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is the reference but for one element in the last tile, or one that is not written."""

    def install(spoil: Callable[[torch.Tensor], object]) -> None:
        def noise(*args: Any) -> tuple[torch.Tensor, ...]:
            x_t, row_B, time_B = noise_reference.noise(*args)
            spoil(x_t)
            return x_t, row_B, time_B

        known = contract.implementation
        fake = SimpleNamespace(noise=noise)
        monkeypatch.setattr(
            contract,
            "implementation",
            lambda op, backend: fake if backend == "cpp" else known(op, backend),
        )

    monkeypatch.setattr(gate_numerics, "SHAPES", ((2, 3, 5, 7),))
    install(lambda x_t: None)
    gate_numerics.noise(CPU, "cpp")
    monkeypatch.undo()
    monkeypatch.setattr(gate_numerics, "SHAPES", ((2, 3, 5, 7),))
    install(lambda x_t: x_t.view(-1)[-1:].mul_(1.001))
    with pytest.raises(GateError, match="ulp"):
        gate_numerics.noise(CPU, "cpp")
    monkeypatch.undo()
    with gate_numerics.poisoned():
        assert torch.empty(3).isnan().all()
    assert not hasattr(torch.empty, "__wrapped__")


@pytest.mark.parametrize("check", ["many_samples", "one_wide_sample", "wide_update"])
def test_the_checks_of_wide_addresses_are_right_at_small_sizes(
    monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """On the GPU they run beyond 2^31 elements; here only their own arithmetic is at stake."""
    monkeypatch.setattr(gate_device, "room", lambda needed, device: None)
    monkeypatch.setattr(gate_device, "BATCH", 3)
    monkeypatch.setattr(gate_device, "SAMPLE", (1, 17, 15))
    monkeypatch.setattr(gate_device, "WIDE_SAMPLE", 8196)
    monkeypatch.setattr(gate_device, "WIDE_BUFFER", 9001)
    assert "elements" in (text := getattr(gate_device, check)(CPU, "reference")) or "param" in text


def test_the_captured_calls_advance() -> None:
    address_2 = torch.zeros(2, dtype=torch.int64)
    step = gate_device.diffusion_step(CPU, "reference", address_2)
    first, second = step(), step()
    assert address_2.tolist() == [2, 0]
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[4], second[4])
    optimizer, twin = (gate_device.make_optimizer(CPU, "reference") for _ in range(2))
    optimizer.step()
    twin.step()
    tensors = gate_device.optimizer_tensors(optimizer)
    assert len(tensors) == 3 * 6  # weight, two moments, two EMAs, counter
    for one, other in zip(tensors, gate_device.optimizer_tensors(twin), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------ counts and report


def test_events_of_a_trace_are_counted() -> None:
    events = [
        {"cat": "kernel", "name": "noise_kernel", "dur": 5.0},
        {"cat": "kernel", "name": "loss_kernel", "dur": 7.0},
        {"cat": "gpu_memset", "dur": 1.0},
        {"cat": "gpu_memcpy", "dur": 1.0},
        {"cat": "cpu_op", "dur": 99.0},
        {"ph": "M"},
    ]
    counts = gpu_counts.count_events(events)
    assert counts["launches"] == 2 and counts["device_copies"] == 2
    assert counts["kernel_time_s"] == pytest.approx(12e-6)


def bench_file(folder: Path, **extra: Any) -> Path:
    stats = {"median": 2e-3, "q1": 1e-3, "q3": 3e-3, "min": 1e-3, "rounds": 7}
    info = {
        "op": "diffusion_step",
        "case": "latents32-b32",
        "provider": "ours",
        "device": "cpu",
        "cpu": "AMD EPYC (AVX512)",
        "floor_fraction": 0.5,
        "ratio_vs_reference": 4.0,
        "ratio_vs_reference_q1": 3.5,
        "ratio_vs_reference_q3": 4.5,
        "not_measured": {"apex": "broken in /home/someone/apex/setup.py"},
    }
    entry = {"name": "test", "group": "g", "stats": stats, "extra_info": info | extra}
    file = folder / "bench.json"
    file.write_text(json.dumps({"datetime": "2026-11-21T01:00:00+00:00", "benchmarks": [entry]}))
    return file


def gate_file(folder: Path, status: str) -> Path:
    file = folder / "gate.json"
    outcome = {"op": "noise", "check": "noise", "status": status, "detail": "3.1 ulp"}
    file.write_text(json.dumps({"gate": [outcome], "conditions": {"gpu": "NVIDIA H200"}}))
    return file


def test_a_page_of_a_run(tmp_path: Path) -> None:
    files = ["--json", str(bench_file(tmp_path)), "--gate", str(gate_file(tmp_path, "green"))]
    out = tmp_path / "out"
    assert (
        report.main([*files, "--out", str(out), "--who", "Some One", "--remark", "no loader"]) == 0
    )
    stem = "ops_h200_202611_some-one"
    assert sorted(path.name for path in out.iterdir()) == [f"{stem}.json", f"{stem}.md"]
    text = (out / f"{stem}.md").read_text()
    assert "**4.00** [3.50, 4.50]" in text and "- no loader" in text
    for made in out.iterdir():
        assert "/home/" not in made.read_text() and "<path>" in made.read_text()
    # The device of the gate is a GPU: the targets are those of GPUs, and this row misses them.
    targets = json.loads((out / f"{stem}.json").read_text())["targets"]
    verdicts = {line["what"]: line["verdict"] for line in targets}
    assert verdicts["diffusion_step: ratio_vs_reference"] == "MISSED"
    assert verdicts["diffusion_step: launches"] == "not measured"
    assert verdicts["train_step: ratio_vs_eager"] == "not measured"


def test_a_red_gate_gives_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(bench_file(tmp_path)), "--gate", str(gate_file(tmp_path, "red"))]
    assert report.main([*files, "--out", str(tmp_path / "out")]) == 1
    assert "noise: 3.1 ulp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_quick_run_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert report.main(["--json", str(bench_file(tmp_path, quick=True)), "--out", str(out)]) == 0
    (made,) = out.glob("*.md")
    assert made.name.startswith("quick-ops_epyc_") and "mean nothing" in made.read_text()


def test_the_environment_is_told_without_folders(monkeypatch):
    for name in conditions.SPEED_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert conditions.environment() == "default"
    monkeypatch.setenv("LD_PRELOAD", "/home/somebody/libjemalloc.so")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert conditions.environment() == "OMP_WAIT_POLICY=PASSIVE, LD_PRELOAD=libjemalloc.so"


def test_names_and_paths_are_removed() -> None:
    value = {"/data/x": ["made by alice on /work/tree/file.py:3", 2.5], "kept": "1/2 and a -> b"}
    assert report.scrubbed(value, ["alice"]) == {
        "<path>": ["made by <name> on <path>:3", 2.5],
        "kept": "1/2 and a -> b",
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz (AVX512)", "xeon"),
        ("", "unknown"),
    ],
)
def test_names_of_devices_in_file_names(name: str, expected: str) -> None:
    assert report.slug(name) == expected
