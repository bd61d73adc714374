"""The training-step benchmark: right counts, providers that train one network, gates that refuse, honest rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.measure import COPY, Case, GateError
from benchmarks.ops.adaln import providers as adaln_providers
from benchmarks.ops.adaln import test_adaln
from benchmarks.ops.diffusion_step.formulas import packed_rows, truth
from benchmarks.ops.diffusion_step.reference_loss import ReferenceLoss
from benchmarks.report import page as report
from benchmarks.report import predictions
from benchmarks.report import targets as report_targets
from benchmarks.train_step import build as train_step_build
from benchmarks.train_step import gate as train_step_gate
from benchmarks.train_step import memory as train_step_memory
from benchmarks.train_step import ours as train_step_ours
from benchmarks.train_step import plain_dit, time_by_category
from benchmarks.train_step import providers as rivals
from benchmarks.train_step.losses import Draw, eager_loss, masked_loss
from benchmarks.train_step.measure import TrainMeasured
from benchmarks.train_step.problem import (
    QUICK,
    Arena,
    Problem,
    State,
    TrainCase,
    make_problem,
    make_state,
    seed_weights,
    shapes_of,
)
from speed_engine.conditions import label
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.distributed import Processes, start, stop
from speed_engine.models import dit
from speed_engine.training import metrics

CPU = torch.device("cpu")
TINY = QUICK[0]
XL = TrainCase("XL2-b4", "XL/2", 4, ("cpu",))


@pytest.fixture
def problem() -> Problem:
    return make_problem(TINY, CPU)


@pytest.fixture
def state() -> State:
    made = make_state(shapes_of(TINY), CPU, Arena())
    made.reset()
    return made


@pytest.fixture
def processes() -> Iterator[Processes]:
    yield start("cpu")
    stop(together=False)


# ------------------------------------------------------------------ counts and predictions


@pytest.mark.parametrize("size", ["S/2", "XL/2", "tiny/2"])
def test_parameters_are_counted_without_building(size: str) -> None:
    shapes = shapes_of(TrainCase("c", size, 1, ()))
    work = predictions.Work(size, 1)
    assert sum(shape.numel() for shape in shapes.values()) == work.parameters
    assert len(shapes) == work.tensors


def test_flop_of_a_step() -> None:
    work = predictions.Work("XL/2", 256)
    assert work.flop == pytest.approx(256 * 711.7e9, rel=1e-3)  # 3 x 237.2 GFLOP an image
    products = sum(6 * m * k * n * count for m, k, n, count in work.products())
    assert 0.99 < (products + work.attention_flop) / work.flop < 1  # embedders, last layer
    assert work.attention_flop == pytest.approx(0.036 * work.flop, rel=0.05)


def test_a_peak_is_never_guessed() -> None:
    assert metrics.peak_tflops("NVIDIA H200") == 989.4
    assert metrics.peak_tflops("NVIDIA H100 PCIe") == 756.0
    for unknown in ("NVIDIA H100", "H200", "NVIDIA GeForce RTX 9090", ""):
        assert metrics.peak_tflops(unknown) is None


def test_predictions_say_so_and_stay_below_the_roof(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row.gpu, row.case, row.provider): row for row in predictions.predictions()}
    assert len(rows) == 6 * (2 * len(predictions.PROVIDERS) - 2)  # fp8: one of the two GPUs
    for (gpu, case, _), row in rows.items():
        assert row.label == "prediction" and 0 < row.mfu_datasheet < 0.8
        ours = rows[gpu, case, "ours-torch, bf16 stream"]
        assert ours.images_per_s >= rows[gpu, case, "compile"].images_per_s
        assert rows[gpu, case, "eager"].images_per_s > rows[gpu, case, "reference"].images_per_s
    assert rows["A100-80", "XL2-b256", "eager"].fits is False
    assert predictions.main(["--markdown"]) == 0
    for line in capsys.readouterr().out.splitlines()[2:]:
        assert line.count("(prediction)") >= 3


# ------------------------------------------------------------------ one network, one loss


def test_the_plain_network_is_ours(state: State, problem: Problem) -> None:
    """Same names, same outputs and gradients from the same weights, in float32."""
    plain = plain_dit.build(weights=state.weights, upload=True, **TINY.network)
    space = Space("latents", (1.0,) * 4, (0.0,) * 4)
    facts = Facts((4, 8, 8), space, {"label": label.described(1000, null=True)})
    ours = dit.build(dit.Config(size=TINY.size), facts, 8)
    seed_weights(ours.named_parameters())
    t_B = torch.tensor([0, 1, 500, 999])
    outs = [
        plain(problem.x0, t_B, problem.labels_B),
        ours(problem.x0, t_B, label=problem.labels_B),
    ]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    weighting = torch.randn_like(outs[0])
    grads = []
    for net, out in zip((plain, ours), outs, strict=True):
        (out * weighting).sum().backward()
        grads.append({name: parameter.grad for name, parameter in net.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-4 * scale)


def test_all_losses_are_the_definition(problem: Problem) -> None:
    """With samples at t = 0 and at others; gradients by the output as well."""
    out = 0.1 * torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    out[:, 4:] += 2.0
    t_B = torch.tensor([0, 700, 0, 3])
    eps = torch.randn(problem.x0.shape, generator=torch.Generator().manual_seed(4))
    draw = Draw(t_B, eps, torch.tensor([0, 2]))
    losses_B, expected_grad = truth(problem.tables, problem.x0, out, t_B, eps)
    rows_T8 = packed_rows(problem.tables)
    reference = ReferenceLoss(problem.tables)
    x0, labels_B = problem.x0, problem.labels_B
    makers = {
        "reference": lambda net: reference(net, x0, labels_B, t_B, eps),
        "eager": lambda net: eager_loss(net, x0, labels_B, draw, rows_T8),
        "masked": lambda net: masked_loss(net, x0, labels_B, t_B, eps, rows_T8),
    }
    for name, make in makers.items():
        leaf = out.clone().requires_grad_()
        loss = make(lambda x_t, t, labels, leaf=leaf: leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert float(loss.detach()) == pytest.approx(float(losses_B.mean()), rel=1e-4), name
        error = (4 * grad.double() - expected_grad).norm() / expected_grad.norm()
        assert float(error) < 1e-3, name


def test_a_draw_is_split_with_its_first_steps() -> None:
    draw = Draw(torch.tensor([0, 5, 6, 0]), torch.zeros(4, 1), torch.tensor([0, 3]))
    assert draw.part(0, 2).first_K.tolist() == [0] and draw.part(2, 4).first_K.tolist() == [1]


def test_providers_train_the_same_network(
    problem: Problem, state: State, processes: Processes
) -> None:
    """The reference, eager whole and in parts, compiled blocks' plain twin, and our engine through its RunConfig."""
    outcomes = {"ours-torch": run(train_step_ours.ours("torch", problem, processes), problem)}
    outcomes["reference"] = run(rivals.reference(problem, state), problem)
    outcomes["eager"] = run(rivals.eager(problem, state), problem)
    outcomes["in parts"] = run(rivals.eager(problem, state, parts=2), problem)
    state.reset()
    expected = train_step_gate.expected_loss(problem, state.weights)
    train_step_gate.judge_reference(outcomes["reference"], expected)
    assert not any(outcome.rounded for outcome in outcomes.values())
    twin = train_step_build.rounded_eager(problem, state)
    outcomes["on the grid"] = twin
    assert twin.rounded
    assert train_step_gate.agree(outcomes, list(outcomes), lambda: twin) == {}
    outcomes["off"] = replace(twin, losses=[*twin.losses[:2], 1.02 * twin.losses[2]])
    assert "step 2" in train_step_gate.agree(outcomes, ["off"], lambda: twin)["off"]
    astray = replace(twin, losses=[1.02 * loss for loss in twin.losses])
    assert "step 0" in train_step_gate.agree(outcomes, ["off"], lambda: astray)["off"]


def run(trainer: rivals.Trainer, problem: Problem) -> train_step_gate.Outcome:
    outcome = train_step_gate.run(problem, trainer)
    trainer.step()
    trainer.check()
    return outcome


def test_the_gate_can_be_red(problem: Problem, state: State, monkeypatch: Any) -> None:
    good = run(rivals.reference(problem, state), problem)
    with pytest.raises(GateError, match="the loss of step 1"):
        train_step_gate.judge(replace(good, losses=[good.losses[0], 2.0, good.losses[2]]), good)
    with pytest.raises(GateError, match="the first loss"):
        train_step_gate.judge_reference(good, 1.01 * good.losses[0])
    with pytest.raises(GateError, match=r"the first loss is nan"):
        train_step_gate.judge_reference(replace(good, losses=[float("nan")]), 1.0)
    turned = {name: -move for name, move in good.weights.items()}
    with pytest.raises(GateError, match="another way"):
        train_step_gate.judge(replace(good, weights=turned), good)
    monkeypatch.setattr(rivals, "DECAY", 0.99)
    forgetful = run(rivals.eager(problem, state), problem)
    with pytest.raises(GateError, match="the way of EMA of"):
        train_step_gate.judge(forgetful, good)
    trainer = rivals.eager(problem, state)
    monkeypatch.setattr(
        State, "reset", lambda self: None
    )  # so that it begins where the last one ended
    with pytest.raises(GateError, match="seeded weights"):
        train_step_gate.run(problem, trainer)


# ------------------------------------------------------------------ memory


def test_rivals_work_in_the_memory_of_an_optimizer() -> None:
    shapes = {"a": torch.Size((8, 4)), "b": torch.Size((16,)), "c": torch.Size((64, 4))}
    param = torch.nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.AdamW([param])
    optimizer.state[param] = {key: torch.zeros(64) for key in ("exp_avg", "exp_avg_sq", "ema")}
    arena = Arena()
    arena.donate(optimizer)
    made = make_state(shapes, CPU, arena)
    assert made.own_bytes == 16 * 256  # only `c` did not fit
    made.weights["a"].fill_(1.0)
    made.emas["b"].fill_(2.0)
    assert (
        float(param.detach().sum()) == 32.0 and float(optimizer.state[param]["ema"].sum()) == 32.0
    )
    low = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    other = Arena()
    other.donate(torch.optim.AdamW([low]))
    assert other.take(4) is None


def test_who_lives_together() -> None:
    everybody = [*train_step_memory.PLAIN, *train_step_memory.OURS]
    assert train_step_memory.plan(XL, CPU, 100e9) == [everybody]
    first, second = train_step_memory.plan(XL, CPU, 22e9)
    assert (
        set(first) | set(second) == set(everybody)
        and "reference" in first
        and "reference" in second
    )
    assert train_step_memory.plan(XL, CPU, 22e9, ["ours-deepspeed"]) == [second]
    assert train_step_memory.plan(XL, CPU, 22e9, ["compile", "ours-torch"]) == [
        ["reference", "compile", "ours-torch"]
    ]
    for names in (first, second):
        assert train_step_memory.needed_bytes(XL, names, CPU) < 23e9
    assert train_step_memory.available_bytes(CPU) > 0


# ------------------------------------------------------------------ rows and pages


def measured() -> TrainMeasured:
    """Two houses: the reference is in both, ours-deepspeed never met eager."""
    first = {
        "reference": [4.0, 8.0],
        "eager": [2.0, 4.0],
        "ours-torch": [1.0, 2.0],
        COPY: [1.0, 1.0],
    }
    second = {"reference": [6.0, 6.0], "ours-deepspeed": [3.0, 3.0], COPY: [1.0, 1.0]}
    case = Case("train_step", "S2-b16", "16x4x32x32", "bfloat16", 10**9)
    times = {**second, **first}
    return TrainMeasured(
        case, CPU, {"torch": "x", "cpu": "AMD EPYC (AVX512)"}, times,
        train_case=TrainCase("S2-b16", "S/2", 16, ("cpu",)), houses=[first, second], matmul_tflops=2.0,
    )  # fmt: skip


def test_a_row_of_the_training_step() -> None:
    row = measured().row("ours-torch")
    assert row["images_per_s"] == pytest.approx(16 / 1.5) and row["model"] == "DiT-S/2"
    assert row["mfu_datasheet"] is None and row["mfu"] == row["mfu_measured"]
    assert row["mfu_measured"] == pytest.approx(16 * 36.334e9 / 1.5 / 2e12, rel=1e-3)
    assert row["ratio_vs_reference"] == 4.0 and row["ratio_vs_eager_q1"] == 2.0
    sharded = measured().row("ours-deepspeed")
    assert sharded["ratio_vs_reference"] == 2.0 and "ratio_vs_reference_q1" in sharded
    assert sharded["ratio_vs_eager"] == 1.0 and "ratio_vs_eager_q1" not in sharded
    assert sharded["ratio_vs_ours_torch"] == 0.5
    assert sharded["ratios_composed"] == ["eager", "ours-torch"]
    known = replace_gpu(measured(), "NVIDIA H200")
    assert known["mfu"] == known["mfu_datasheet"] == pytest.approx(known["tflops"] / 989.4)
    assert replace_gpu(measured(), "NVIDIA X")["mfu_datasheet"] is None
    assert "ratio_vs_eager" not in measured().row("reference")


def replace_gpu(case: TrainMeasured, name: str) -> dict[str, Any]:
    case.gpu = name
    return case.row("ours-torch")


def test_the_page_of_a_training_step(tmp_path: Path) -> None:
    entries = []
    for name in ("reference", "eager", "ours-torch", "ours-deepspeed"):
        row = measured().row(name) | {
            "peak_memory_bytes": 3 * 10**9,
            "amx": False,
            "ms_by_category": {"matrix products": 30.0, "attention": 10.0},
        }
        stats = {"median": 1.5, "q1": 1.0, "q3": 2.0, "min": 1.0, "rounds": 2}
        row["environment"] = "LD_PRELOAD=x" if name == "ours-deepspeed" else "default"
        entries.append({"name": name, "group": "g", "stats": stats, "extra_info": row})
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"datetime": "2026-11-21T01:00:00+00:00", "benchmarks": entries}))
    assert report.main(["--json", str(file), "--out", str(tmp_path), "--what", "step"]) == 0
    text = (tmp_path / "step_epyc_202611_anonymous.md").read_text()
    assert "| S2-b16 ours-torch | **4.00** [4.00, 4.00] | **2.00** [2.00, 2.00] |" in text
    assert "| S2-b16 ours-deepspeed | **2.00** [2.00, 2.00] | 1.00 | 0.50 |" in text
    assert "images/s" in text and "3.0 GB" in text and "MFU, datasheet" not in text
    assert "reference with ours-deepspeed" in text
    assert "than the page's: S2-b16 ours-deepspeed: LD_PRELOAD=x." in text
    assert "| S2-b16 | eager | 30.0 (75 %) | 10.0 (25 %) |" in text
    lines = report_targets.verdicts([entry["extra_info"] for entry in entries], "cpu")
    steps = {(line["what"], line["case"], line["must"]): line["verdict"] for line in lines}
    ratio = "train_step: ratio_vs_reference"
    assert steps[ratio, "S2-b16 ours-torch", "1.05"] == "goal reached"
    assert (ratio, "S2-b16 ours-torch", "2.3") not in steps  # that is a target of CPUs with AMX
    assert steps["train_step: ratio_vs_ours_torch", "S2-b16 ours-deepspeed", "0.87"] == "MISSED"


# ------------------------------------------------------------------ profile


@pytest.mark.parametrize(
    ("name", "scopes", "expected"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNN", (), time_by_category.MATRIX),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", (), time_by_category.MATRIX),
        ("triton_tem_fused_addmm_3", (), time_by_category.MATRIX),
        ("aten::addmm", (), time_by_category.MATRIX),
        ("pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96>>", (), time_by_category.ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", (), time_by_category.ATTENTION),
        ("triton_red_fused_native_layer_norm_4", (), time_by_category.NORM),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", (), time_by_category.NORM),
        ("void at::native::vectorized_elementwise_kernel<4>", ("aten::mul_", "ema"), time_by_category.OPTIMIZER),
        ("aten::addcdiv_", ("Optimizer.step#AdamW.step",), time_by_category.OPTIMIZER),
        ("update_kernel", (), time_by_category.OPTIMIZER),
        ("speed_kernels::diffusion_loss", (), time_by_category.DIFFUSION),
        ("noise_kernel", (), time_by_category.DIFFUSION),
        ("speed_kernels::gate_residual_norm_modulate_backward", (), time_by_category.NORM),
        ("Memcpy HtoD (Pageable -> Device)", (), time_by_category.OTHER),
    ],
)  # fmt: skip
def test_categories(name: str, scopes: tuple[str, ...], expected: str) -> None:
    assert time_by_category.category(name, scopes) == expected


def test_a_profile_adds_up(problem: Problem, state: State) -> None:
    trainer = rivals.eager(problem, state)
    found = time_by_category.profile(trainer.step, CPU, steps=1)
    spent = found["milliseconds"]
    assert all(spent[name] > 0 for name in (time_by_category.MATRIX, time_by_category.ATTENTION))
    whole = time_by_category.with_rest(spent, sum(spent.values()) + 5.0, CPU)
    assert whole[time_by_category.UNSEEN] == pytest.approx(5.0)
    assert time_by_category.with_rest(spent, 0.0, CPU)[time_by_category.UNSEEN] == 0.0
    assert spent[time_by_category.OPTIMIZER] > 0 and found["calls"][time_by_category.OPTIMIZER] >= 2


# ------------------------------------------------------------------ single ops


def test_bytes_of_single_ops() -> None:
    low, full = torch.bfloat16, torch.float32
    large = 2 * 256 * 384
    for stream, forward, backward in ((low, 8, 12), (full, 12, 18)):
        made = adaln_providers.glue_problem(2, 256, 384, stream, low, CPU)
        assert adaln_providers.forward_bytes(made) / large == pytest.approx(forward, rel=0.01)
        assert adaln_providers.backward_bytes(made) / large == pytest.approx(backward, rel=0.01)


def test_the_gate_of_single_ops_can_be_red() -> None:
    glue = adaln_providers.glue_problem(2, 5, 16, torch.float32, torch.float32, CPU)
    gelu = adaln_providers.gelu_problem(6, 16, torch.float32, CPU)
    test_adaln.check(adaln_providers.plain_glue, glue, by_hand=False)
    test_adaln.check(adaln_providers.after_product, gelu, by_hand=True)
    test_adaln.check(adaln_providers.plain_gelu, gelu, by_hand=False)

    def shifted(*inputs: Tensor) -> tuple[Tensor, ...]:
        total, y = adaln_providers.plain_glue(*inputs)
        return total, y + 0.01

    with pytest.raises(GateError, match="result 1 is off"):
        test_adaln.check(shifted, glue, by_hand=False)
    with pytest.raises(GateError, match="result 0 is off"):
        test_adaln.check(lambda x, bias: (1.001 * (x + bias).relu(),), gelu, by_hand=False)
