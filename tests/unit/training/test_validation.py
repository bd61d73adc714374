"""The validation loss against a plain restatement, against denoisers whose errors are known, and its bookkeeping."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from speed_kernels import philox

from speed_engine import kinds
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.data.split import SPLIT_SEED
from speed_engine.distributed import Processes
from speed_engine.objectives import COLUMNS
from speed_engine.step_table import build_step_table
from speed_engine.training import validation
from speed_engine.training.validation import Validation

SHAPE = (2, 3, 3)
BACKENDS = {"noise": "reference", "loss": "reference"}


class Normals:
    """Samples from N(0, 1), float32."""

    facts = Facts(SHAPE, Space.pixels(2))
    fingerprint = "0" * 64

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def read(self, indices, flips=None):
        return self.x[indices], {}

    def decode(self, stored, normals=None):
        return stored


def table_of(schedule="linear", objective="epsilon", timesteps="uniform"):
    sections = {"schedule": schedule, "objective": objective, "timesteps": timesteps}
    configs = [kinds.config_of(section, kind) for section, kind in sections.items()]
    return build_step_table(*configs, False)


def judge(network, table, size=100, rows=4, rank=0, world=1) -> Validation:
    processes = SimpleNamespace(
        rank=rank, world=world, device=torch.device("cpu"), sum=lambda tensor: tensor
    )
    return Validation(network, table, Normals(size), {}, processes, rows, False, BACKENDS, "ema")


class Scaled(torch.nn.Module):
    """f(x, t) = g x: what it gets wrong can be said."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def forward(self, x, time_B):
        return self.gain * x


@pytest.mark.parametrize(
    ("schedule", "objective"),
    [
        ("linear", "epsilon"),
        ("cosine", "v"),
        ("linear", "x0"),
        ("rectified_flow", "flow"),
        ("edm", "edm"),
    ],
)
def test_against_plain_float64(schedule, objective):
    """x_t, the network, the target and the three errors written out, from philox.normals and the table's columns."""
    table = table_of(schedule, objective)
    size, each = 70, 3
    it = judge(Scaled(), table, size, each)
    error_NK, row_NK = it.errors()
    line, x_N = validation.summary(error_NK, row_NK, table), Normals(size).x
    columns = [table.rows_T8[:, COLUMNS.index(name)].double() for name in "ABCD"]
    golden = (5**0.5 - 1) / 2
    found = torch.zeros(3, size, each, dtype=torch.float64)
    for i in range(size):
        for k in range(each):
            row = int((k + ((i + 0.5) * golden) % 1) / each * table.num_rows)
            assert row == row_NK[i, k]
            a, b, c, d = (float(column[row]) for column in columns)
            x0 = x_N[i].double()
            eps = (
                philox.normals(SPLIT_SEED, k, torch.tensor([i]), philox.STREAM_EPS, x0.numel())[0]
                .view(SHAPE)
                .double()
            )
            out = 0.5 * (a * x0 + b * eps).float().double()
            # The two unknowns (x0, eps) that give the same x_t and the network's output.
            matrix = torch.tensor([[a, b], [c, d]], dtype=torch.float64)
            told = torch.stack([(a * x0 + b * eps).flatten(), out.flatten()])
            x0_hat, eps_hat = torch.linalg.solve(matrix, told).view(2, *SHAPE)
            norm = math.hypot(a, b)
            v, v_hat = ((a * e - b * x) / norm for x, e in ((x0, eps), (x0_hat, eps_hat)))
            for which, (one, other) in enumerate([(eps, eps_hat), (x0, x0_hat), (v, v_hat)]):
                found[which, i, k] = (one - other).square().mean()
    for which, name in enumerate(("loss", "x0", "v")):
        assert line[f"validation_{name}"] == pytest.approx(float(found[which].mean()), rel=2e-4)
        spread = float(found[which].mean(1).std()) / math.sqrt(size)
        assert line[f"validation_{name}_se"] == pytest.approx(spread, rel=2e-3)


def test_the_known_error_of_the_best_denoiser():
    """x0 ~ N(0, 1) on a variance-preserving schedule: E[eps | x_t] = sigma x_t, whose error is alpha^2."""
    table = table_of()
    sigma_T = table.rows_T8[:, COLUMNS.index("B")]

    class Best(torch.nn.Module):
        def forward(self, x, time_B):
            return sigma_T[time_B.long()].view(-1, 1, 1, 1) * x

    it = judge(Best(), table, 2000, 4)
    error_NK, row_NK = it.errors()
    line = validation.summary(error_NK, row_NK, table)
    alpha_T = table.rows_T8[:, COLUMNS.index("A")].double()
    exact = float(alpha_T[row_NK].square().mean())
    assert abs(line["validation_loss"] - exact) < 4 * line["validation_loss_se"]
    assert line["validation_loss_se"] < 0.02 * exact
    by = line["validation_by_log_snr"]
    for low, high, mean, spread in zip(
        by["edges"][1:], by["edges"][2:], by["eps"][1:], by["eps_se"][1:], strict=False
    ):
        if (
            mean is not None and spread is not None
        ):  # alpha^2 = SNR / (1 + SNR) within the bin's ends
            least, most = (math.exp(edge) / (1 + math.exp(edge)) for edge in (low, high))
            assert least - 5 * spread < mean < most + 5 * spread


def test_no_method_moves_it():
    """The same rows, noise and number under a density that moves the rows of training."""
    plain = judge(Scaled(), table_of("rectified_flow", "flow")).errors()
    parts = SimpleNamespace(
        held_out=Normals(100), model=Scaled(), conditions={}, backends=BACKENDS,
        processes=Processes(0, 1, 0, torch.device("cpu")),
        config=SimpleNamespace(
            schedule=kinds.config_of("schedule", "rectified_flow"),
            objective=kinds.config_of("objective", "flow"),
            timesteps=kinds.config_of("timesteps", "logit_normal"),
            learned_variance=False, engine=SimpleNamespace(precision="fp32"),
            validation=SimpleNamespace(rows=4, weights="ema"),
        ),
    )  # fmt: skip
    made = validation.of(parts)
    assert made is not None and not made.network.training
    for a, b in zip(plain, made.errors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("world", [2, 3])
def test_the_same_at_any_number_of_processes(world):
    whole, _ = judge(Scaled(), table_of(), 300).errors()
    shared = sum(
        judge(Scaled(), table_of(), 300, rank=rank, world=world).errors()[0]
        for rank in range(world)
    )
    assert torch.equal(whole, shared)


def test_rows_cover_the_measure_evenly():
    row_NK = validation.rows(500, 8, 1000)
    assert row_NK.min() >= 0 and row_NK.max() <= 999
    counts = torch.bincount(row_NK.flatten() // 100, minlength=10)
    assert (counts - 400).abs().max() <= 4
    assert all((row_NK[:, k] // 125 == k).all() for k in range(8))


@pytest.mark.parametrize("objective", ["v", "x0"])
def test_every_error_is_finite_at_pure_noise(objective):
    schedule = kinds.config_of("schedule", {"kind": "linear", "zero_terminal_snr": True})
    configs = (kinds.config_of("objective", objective), kinds.config_of("timesteps", "uniform"))
    table = build_step_table(schedule, *configs, False)
    gain_3T = validation.gains(table)
    assert gain_3T.isfinite().all() and gain_3T[0, -1] == 0 and gain_3T[1, -1] == 1
