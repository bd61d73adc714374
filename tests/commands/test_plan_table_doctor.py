"""plan, table and doctor: what they print is what the configuration says, number by number."""

import csv
import importlib.metadata
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from speed_kernels import contract
from speed_kernels.build import isa

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------ plan


def number(pattern: str, text: str) -> float:
    (found,) = re.findall(pattern, text, re.MULTILINE)
    return float(found.replace(",", ""))


def test_plan_prints_a_configuration_that_reads_back(good, tmp_path):
    words = ("optim.lr=3e-4", "timesteps.k=3", "train.steps=7", "train.global_batch=6")
    first = good("plan", "--config", "digits_dit_tiny", f"data.path={tmp_path / 'none'}", *words)
    text = first.out.split("\n\n")[-1]
    resolved = yaml.safe_load(text)
    assert resolved["optim"]["lr"] == 3e-4 and resolved["timesteps"]["k"] == 3
    assert resolved["train"]["steps"] == 7 and resolved["model"]["size"] == "tiny/2"
    again = tmp_path / "resolved.yaml"
    again.write_text(text)
    assert good("plan", "--config", again).out == first.out


@pytest.mark.parametrize("model", ["dit", "mdt"])
def test_plan_counts_one_pass_of_validation_and_samples(good, tmp_path, model):
    """An MDT trains by two, one of them masked."""
    words = [f"data.path={tmp_path / 'none'}", "train.global_batch=10", "log.every=5"]
    words += [f"model={{kind: {model}, size: tiny/2}}", "validation={every: 5, samples: 50}"]
    words += ["sample={every: 10, num: 5, steps: 20, guidance: 2}", "validation.rows=3"]
    plan = good("plan", "--config", "digits_dit_tiny", *words).out
    passes = 1 if model == "dit" else number(r"in training ([\d.]+) times", plan)
    assert (passes > 1.3) == (model == "mdt")
    for name, share in (("validation", 50 * 3 / (3 * 5 * 10)), ("samples", 200 / (3 * 10 * 10))):
        found = number(rf"^{name} .* ([\d.]+)% of the training", plan)
        assert found == pytest.approx(100 * share / passes, rel=0.01)


def test_plan_counts_the_published_network(good):
    """DiT-XL/2 at 256: 675 M parameters and 119 G multiply-adds (Peebles & Xie 2023, table 1)."""
    answer = good("plan", "--config", "imagenet256_dit_xl2", "data.path=nowhere")
    parameters = number(r"^parameters +([\d,]+)", answer.out)
    assert parameters == pytest.approx(675e6, rel=0.002)
    assert number(r"^forward pass +([\d.e+-]+) GMAC", answer.out) == pytest.approx(118.6, rel=0.01)
    resolved = yaml.safe_load(answer.out.split("\n\n")[-1])["train"]
    images = resolved["steps"] * resolved["global_batch"]
    assert number(r": ([\d.e+]+) FLOP$", answer.out) == pytest.approx(
        6 * 118.6e9 * images, rel=0.01
    )
    # fp32 weights, gradients, two moments and the EMA are 20 bytes a parameter; on one process always.
    zero = dict(re.findall(r"^ +([0-3]) +([\d.]+) GiB", answer.out, re.MULTILINE))
    assert set(zero) == {"0", "1", "2", "3"}
    assert float(zero["0"]) == pytest.approx(20 * parameters / 2**30, abs=0.01)


def test_plan_of_data_that_are_there(good, run, overrides, read_json):
    """The very run: its data, its method's numbers; the network is counted as the file holds it."""
    from safetensors import safe_open

    answer = good("plan", "--config", "digits_dit_tiny", *overrides(run))
    assert "1x8x8" in answer.out and re.search(r"^condition +label: 10 ", answer.out, re.MULTILINE)
    assert number(r"^ +tau = (\d+)", answer.out) == 700
    with safe_open(run / "checkpoints" / "step-00000020" / "ema.safetensors", "pt") as file:
        held = sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    assert number(r"^parameters +([\d,]+)", answer.out) == held
    trained = number(r"^parameters .* ([\d,]+) of them trained", answer.out)
    assert trained == read_json(run / "manifest.json")["parameters"]


def test_plan_of_a_cluster(good, command):
    """The lines that matter come first, none is long, and the prediction scales as its formula says."""
    words = ("plan", "--config", "imagenet256_dit_xl2", "data.path=nowhere", "--gpus", "8")
    text = good(*words, "--nodes", "2", "--tflops", "400", "--network", "25").out
    first = text.split("\n\n")[0].splitlines()
    assert len(first) <= 12 and max(map(len, text.splitlines())) <= 100
    for name in ("fits?", "disk", "time", "wire", "weak scaling", "processes", "activations"):
        assert any(line.startswith(name) for line in first), name
    assert "predicted, not measured" in text and "formula" in text
    macs = number(r"^forward pass +([\d.e+-]+) GMAC", text) * 1e9
    best = number(r"at best ([\d,]+) images/s", text)
    high = number(r"^weak scaling +predicted \d+% to (\d+)%", text) / 100
    assert best == pytest.approx(16 * 400e12 / (6 * macs) * high, rel=0.02)
    answer = command(*words, "train.global_batch=100")
    assert answer.code == 2 and "train.global_batch=100" in answer.err
    assert "above 0" in command(*words[:-1], "0").err


@pytest.mark.parametrize(("precision", "warned"), [("fp32", True), ("auto", False)])
def test_plan_warns_of_float32_on_gpus(good, precision, warned):
    words = ("plan", "--config", "digits_dit_tiny", "data.path=nowhere", "--gpus", "1")
    shown = good(*words, f"engine.precision={precision}").out
    assert ("fp32 on a GPU, without TF32" in shown) is warned


def test_plan_counts_what_a_unet_keeps(good):
    words = ("plan", "--config", "imagenet256_unet", "data.path=nowhere")
    found = [
        number(r"^activations +([\d.]+) MiB", good(*words, f"model.num_blocks={n}").out)
        for n in (1, 2)
    ]
    assert 5 < found[0] < found[1] < 2 * found[0] < 200


def test_plan_writes_nothing(good, tmp_path):
    (tmp_path / "empty").mkdir()
    answer = good("plan", "--config", "digits_dit_tiny", f"data.path={tmp_path / 'empty'}")
    assert "1x8x8" in answer.out
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


# ----------------------------------------------------------------------------------------------- table

SPEED = ("schedule.kind=linear", "timesteps.kind=speed", "timesteps.k=4")


def linear_alpha_bar() -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def test_table_as_json_is_the_method(good):
    """SpeeD: suppressed by k after tau = 700, on the linear schedule's alpha-bar."""
    table = json.loads(good("table", *SPEED, "--json").out)
    rows = table["rows"]
    assert [row["t"] for row in rows] == list(range(1000))
    alpha_bar = linear_alpha_bar()
    assert np.allclose([row["alpha_bar"] for row in rows], alpha_bar, rtol=1e-9)
    log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
    assert np.allclose([row["log_snr"] for row in rows], log_snr, atol=1e-6)
    mass = np.where(np.arange(1000) < 700, 1.0, 1 / 4)
    assert np.allclose([row["density"] for row in rows], mass / mass.sum(), rtol=1e-9)
    assert {row["area"] for row in rows[700:]} == {"convergence"}
    assert table["timesteps"]["k"] == 4 and table["timesteps"]["tau"] == 700
    assert table["schedule"]["kind"] == "linear"
    expected = sum(row["density"] * row["weight"] for row in rows)
    assert table["timesteps"]["expected_weight"] == pytest.approx(expected)


def test_table_as_csv_holds_the_same_rows(good):
    rows = json.loads(good("table", *SPEED, "--json").out)["rows"]
    read = list(csv.DictReader(io.StringIO(good("table", *SPEED, "--csv").out)))
    assert len(read) == len(rows)
    for row, text in zip(rows, read, strict=True):
        assert text["area"] == row["area"]
        for key in ("t", "alpha_bar", "log_snr", "density", "weight"):
            assert float(text[key]) == row[key]


def test_table_as_text_shows_the_same_numbers(good):
    rows = json.loads(good("table", *SPEED, "--json").out)["rows"]
    shown = [line.split() for line in good("table", *SPEED).out.splitlines()]
    shown = [words for words in shown if words and words[0].isdigit()]
    assert len(shown) > 10 and shown[0][0] == "0" and shown[-1][0] == "999"
    for t, alpha_bar, log_snr, relative, weight, area in shown:
        row = rows[int(t)]
        assert area == row["area"]
        assert float(alpha_bar) == pytest.approx(row["alpha_bar"], rel=1e-3)
        assert float(log_snr) == pytest.approx(row["log_snr"], abs=1e-3)
        assert float(relative) == pytest.approx(1000 * row["density"], abs=1e-4)
        assert float(weight) == pytest.approx(row["weight"], abs=1e-4)


def test_compare_sums_up_each_methods_own_table(good):
    """The share of density x weight in each interval of log-SNR, recomputed from `table --json`."""
    kinds = ["uniform", "min_snr", "speed"]
    shown = json.loads(good("table", "schedule=cosine", "--compare", ",".join(kinds), "--json").out)
    edges = [np.inf, 5, 2, 0, -2, -5, -np.inf]
    assert shown["bins"] == [">5", "2..5", "0..2", "-2..0", "-5..-2", "<-5"]
    assert list(shown["shares"]) == kinds
    for kind in kinds:
        table = json.loads(good("table", "schedule=cosine", f"timesteps={kind}", "--json").out)
        log_snr = np.array([row["log_snr"] for row in table["rows"]])
        mass = np.array([row["density"] * row["weight"] for row in table["rows"]])
        shares = [
            mass[(log_snr <= high) & (log_snr > low)].sum() / mass.sum()
            for high, low in itertools.pairwise(edges)
        ]
        assert np.allclose(shown["shares"][kind], shares, atol=1e-9), kind


def test_compare_as_csv_and_as_text(good):
    words = ("table", "--compare", "uniform,speed")
    shares = json.loads(good(*words, "--json").out)["shares"]
    read = list(csv.DictReader(io.StringIO(good(*words, "--csv").out)))
    assert {row.pop("method"): list(map(float, row.values())) for row in read} == shares
    lines = [line.split() for line in good(*words).out.splitlines()[1:]]
    for name, *values in lines:
        assert np.allclose([float(v) for v in values], shares[name], atol=6e-4)
    assert [line[0] for line in lines] == list(shares)


def test_the_tables_pictures(good, tmp_path, is_a_picture):
    answer = good("table", *SPEED, "--plot", tmp_path / "one")
    drawn = sorted((tmp_path / "one").glob("*.png"))
    assert len(drawn) == 2 and all(map(is_a_picture, drawn))
    assert all(str(path) in answer.err for path in drawn)
    good("table", "--compare", "uniform,speed", "--plot", tmp_path / "two.png")
    assert is_a_picture(tmp_path / "two.png")


# ---------------------------------------------------------------------------------------------- doctor


def test_doctor_as_json_knows_this_machine(good):
    facts = json.loads(good("doctor", "--json").out)
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["packages"]["deepspeed"] == importlib.metadata.version("deepspeed")
    assert facts["cpu"]["isa"] == isa() and facts["cpu"]["threads"] >= 1
    here = {kernel["op"]: kernel for kernel in facts["kernels"] if kernel["device"] == "cpu"}
    ops = {op for op in contract.ops() if contract.backends(op)}
    assert set(here) == ops | {"attention"}
    for op in ops:
        assert here[op]["backend"] == contract.choose(op, "cpu").backend
        assert here[op]["reason"]


def test_doctor_as_text_tells_the_same(good):
    facts = json.loads(good("doctor", "--json").out)
    text = good("doctor").out
    for kernel in facts["kernels"]:
        (line,) = [
            line for line in text.splitlines() if f"{kernel['op']} on {kernel['device']}:" in line
        ]
        assert kernel["backend"] in line and kernel["reason"] in line
    assert re.search(r"^precision +fp32 on a GPU, without TF32: ", text, re.MULTILINE)
    assert "engine.precision=auto takes bf16" in " ".join(text.split())
    for package, version in facts["packages"].items():
        assert re.search(rf"^{package} +{re.escape(version)}", text, re.MULTILINE)


def test_doctor_knows_places_and_what_is_missing(good, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models").mkdir(parents=True)
    (tmp_path / "hub" / "models" / "weights").write_bytes(bytes(3 * 2**20))
    facts = json.loads(good("doctor", "--json").out)
    assert facts["hub_cache_bytes"] == 3 * 2**20 and facts["disk_free_bytes"] > 0
    assert facts["optional"]["scikit-learn"] == importlib.metadata.version("scikit-learn")
    text = good("doctor").out
    assert f"{tmp_path / 'hub'} (3.0 MiB)" in text
    for name, thing in (("torch-fidelity", "Inception"), ("wandb", "log.wandb=true")):
        assert re.search(rf"^{name} .*{thing}", text, re.MULTILINE)
    for name in ("NCCL", "disk", "kernel_cache"):
        assert re.search(rf"^{name} ", text, re.MULTILINE)


def test_doctor_tells_a_torch_that_cannot_be_imported(tmp_path):
    """A library that is missing on this machine: the versions are told all the same, and one sentence."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: not found')")
    path = f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}"
    line = [sys.executable, "-m", "speed_engine", "doctor"]
    done = subprocess.run(
        line, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True
    )
    version = re.escape(importlib.metadata.version("torch"))
    assert re.search(f"^torch +{version}$", done.stdout, re.MULTILINE)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be imported: libcudart.so.13" in done.stderr
