"""Methods that change while training runs: each moves to what is known to be right, and resumes exactly.

The network is replaced by a function row -> loss. A step draws rows through the real op, looks
their losses up, observes and refreshes.
"""

import importlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speed_engine import kinds
from speed_engine.step_table import StepTable, build_step_table
from speed_engine.timesteps import parse

BATCH = 64


def config(folder: str, kind: str, **options):
    return importlib.import_module(f"speed_engine.{folder}.{kind}").Config(**options)


def make(kind: str, schedule: str = "linear", objective: str = "epsilon", **options) -> StepTable:
    on = config("schedules", schedule, **({"num_steps": 40} if schedule == "linear" else {}))
    method = parse({"kind": kind, **options})
    table = build_step_table(on, config("objectives", objective), method)
    table.start(BATCH, (4, 8, 8))
    return table


def step(table: StepTable, number: int, loss_T: torch.Tensor, noise: float = 0.1, rank=(0, 1)):
    """One training step of a rank; returns what it drew."""
    share = BATCH // rank[1]
    address_2 = torch.tensor([number, rank[0] * share])
    x0 = torch.zeros(share, 1)
    _, row_B, _ = table.noise(x0, address_2, seed=3, num_slots=BATCH, backend="reference")
    jitter = torch.randn(BATCH, generator=torch.Generator().manual_seed(number))[
        rank[0] * share : (rank[0] + 1) * share
    ]
    mse_B = loss_T[row_B] * (1 + noise * jitter).abs()
    table.observe(address_2, row_B, torch.stack([mse_B, mse_B, torch.zeros_like(mse_B)]))
    return row_B


def run(table: StepTable, steps: range, loss_T: torch.Tensor, noise: float = 0.1) -> None:
    for number in steps:
        step(table, number, loss_T, noise)
        table.refresh(number + 1)


SLOPE = torch.linspace(0.1, 2.0, 40, dtype=torch.float64)


def test_loss_second_moment_finds_the_optimal_density():
    table = make("loss_second_moment", every=5)
    run(table, range(5), SLOPE)
    assert torch.equal(table.density, table.schedule.uniform)  # not every step has ten losses yet
    run(table, range(5, 150), SLOPE)
    best = SLOPE / SLOPE.sum()
    assert (table.density - best).abs().sum() < 0.1
    # unbiased: density times weight is uniform
    torch.testing.assert_close(table.density * table.weight, torch.full((40,), 1 / 40).double())
    assert table.rows_T8[:, 4].double().sub(table.weight).abs().max() < 1e-5
    biased = make("loss_second_moment", every=5, corrected=False)
    run(biased, range(150), SLOPE)
    assert (biased.weight == 1).all()


def test_second_moment_keeps_the_last_losses_in_order():
    table = make("loss_second_moment", every=3, history=4)
    assert table.session is not None
    part: Any = table.session.parts[0]
    expected: list[list[float]] = [[] for _ in range(40)]
    for number in range(9):
        loss_T = torch.arange(40).double() / 40 + number
        for row in step(table, number, loss_T, noise=0).tolist():
            expected[row].append(loss_T[row].item())
        table.refresh(number + 1)
    for row in range(40):
        assert sorted(part.ring[row].tolist()[: len(expected[row])]) == pytest.approx(
            sorted(expected[row][-4:]), rel=1e-6
        )
        assert part.count[row] == len(expected[row])


@pytest.mark.parametrize("objective", ["epsilon", "v"])
def test_infonoise_follows_the_information_rate(objective):
    """Unit Gaussian data: mmse = sigma^2 / (1 + sigma^2) exactly, so rho is known."""
    table = make(
        "infonoise", "continuous_vp", objective, every=20, warmup_steps=40, uniform_share=0,
        num_bins=32, sigma_data=1.0, gate=0.15,
    )  # fmt: skip
    on = table.schedule
    sigma = on.sigma / on.alpha
    mmse_T = sigma.square() / (1 + sigma.square())
    loss_T = mmse_T * table.objective.gain(on).square()
    before = table.density.clone()
    run(table, range(39), loss_T)
    assert torch.equal(table.density, before)
    run(table, range(39, 400), loss_T, noise=0.05)
    gate = sigma**3 / (sigma**3 + 0.15**3)
    rho = mmse_T / sigma.square() * gate
    # density x weight on x0, per unit of ln sigma, follows rho
    weight_x0 = table.weight * table.objective.gain(on).square()
    best = rho * torch.gradient(sigma.log())[0] / weight_x0
    best = best / best.sum()
    distance = (table.density - best).abs().sum() / 2
    assert distance < 0.05
    assert (before - best).abs().sum() / 2 > 3 * distance


def test_infonoise_finds_its_gate():
    """mmse that vanishes below sigma = 0.2 like sigma^6: the onset rule leaves the clean end out."""
    table = make("infonoise", "continuous_vp", every=20, warmup_steps=20, gate=None, sigma_data=1.0)
    sigma = table.schedule.sigma / table.schedule.alpha
    loss_T = 1 / (1 + sigma.square()) / (1 + (0.2 / sigma) ** 6)
    run(table, range(200), loss_T)
    assert table.density[sigma < 0.05].sum() < 0.02


def test_ant_uw_reaches_the_equilibrium():
    """s_c -> ln L_c, so a cluster's weight is 1 / (2 L_c)."""
    table = make("ant_uw", num_clusters=4)
    loss_T = torch.tensor([0.25, 0.5, 1.0, 2.0]).double().repeat_interleave(10)
    run(table, range(600), loss_T, noise=0.02)
    torch.testing.assert_close(table.weight, 0.5 / loss_T, rtol=0.08, atol=0)
    assert torch.equal(table.density, table.schedule.uniform)


def test_ant_uw_as_its_authors_run_it():
    """The cluster's mean is divided by their number, so the weight settles at num / (2 L_c)."""
    table = make("ant_uw", num_clusters=4, official=True)
    assert table.timesteps.weight_vb and not make("ant_uw").timesteps.weight_vb
    loss_T = torch.tensor([0.25, 0.5, 1.0, 2.0]).double().repeat_interleave(10)
    run(table, range(900), loss_T, noise=0.02)
    torch.testing.assert_close(table.weight, 4 * 0.5 / loss_T, rtol=0.08, atol=0)


@pytest.mark.parametrize("official", [False, True])
def test_ant_uw_learns_from_the_variational_term_as_its_authors_do(official):
    """One step of Adam on s from 0: up where half the gradient, (1 - L_c) / 2, is negative."""
    table = make("ant_uw", num_clusters=2, official=official)
    mse, vb = 0.9, 1.3  # alone below one; (mse + vb) / 2 is above
    row_B = torch.arange(BATCH) % 40
    losses_3B = torch.tensor([[7.0], [mse], [vb]]).expand(3, BATCH)
    table.observe(torch.tensor([0, 0]), row_B, losses_3B)
    table.refresh(1)
    s = 0.025 if official else -0.025  # Adam's first step is its learning rate
    expected = torch.full_like(table.weight, s).neg().exp() / 2
    torch.testing.assert_close(table.weight, expected, rtol=1e-6, atol=0)


def test_edm2_uncertainty_flattens_the_loss():
    """At u's optimum lambda exp(-u) error is one at every noise level."""
    table = make("edm2_uncertainty", "edm", "edm", num_features=32)
    level = table.schedule.log_snr
    loss_T = 0.2 + 0.8 * torch.sigmoid(-level / 2)
    assert ((table.weight - 1).abs() < 1e-12).all()
    run(table, range(500), loss_T, noise=0.02)
    weighted = table.weight * loss_T
    mean = (table.density * weighted).sum()
    spread = (table.density * (weighted - mean).square()).sum().sqrt()
    assert mean.item() == pytest.approx(1, abs=0.05)
    assert spread < 0.06


def test_clts_moves_from_uniform_to_its_gaussian():
    table = make("clts", total_steps=100, every=10)
    uniform = table.density.clone()
    run(table, range(50), SLOPE)
    half = table.density.clone()
    run(table, range(50, 120), SLOPE)
    torch.testing.assert_close(half, (uniform + table.density) / 2)
    peak = int(table.density.argmax())
    assert abs(peak - 12) <= 1
    assert table.density[28:].sum().item() == pytest.approx(0.024, abs=0.002)


def test_clts_of_the_release_stays_uniform():
    """Within 0.4 % for 90 % of the run; a single step at its end."""
    schedule = config("schedules", "linear")
    method = parse({"kind": "clts_speed_release", "every": 1000})
    table = build_step_table(schedule, config("objectives", "epsilon"), method)
    table.start(BATCH)
    table.refresh(45_000)
    assert (table.density - 1e-3).abs().sum() / 2 < 0.004
    table.refresh(50_000)
    assert table.density[300].item() == pytest.approx(1)


def test_task_curriculum_adds_clusters_when_the_loss_stalls():
    table = make(
        "task_curriculum", num_clusters=4, patience=20, every=5, smoothing=0.5, tolerance=0.05
    )
    assert table.density[:30].sum() == 0
    falling = [torch.full((40,), 2.0 * 0.98**number).double() for number in range(60)]
    for number in range(40):  # improving: the first cluster only
        step(table, number, falling[number], noise=0)
        table.refresh(number + 1)
    assert table.density[:30].sum() == 0
    run(table, range(40, 70), falling[-1], noise=0)
    assert table.density[20:30].sum() > 0.4
    run(table, range(70, 200), falling[-1], noise=0)
    torch.testing.assert_close(table.density, table.schedule.uniform)


# What all of them keep.

ONLINE = {
    "loss_second_moment": {"every": 7},
    "infonoise": {"every": 7, "warmup_steps": 14, "num_bins": 8},
    "ant_uw": {"every": 3},
    "edm2_uncertainty": {"every": 2, "num_features": 8},
    "task_curriculum": {"every": 5, "patience": 5, "num_clusters": 4, "tolerance": 1.0},
    "clts": {"every": 4, "total_steps": 60},
    "clts_speed_release": {"every": 4, "total_steps": 60, "mu": 12},
    "curriculum": {"first": {"kind": "ant_uw", "every": 6}, "then": "uniform", "at": 24, "ramp": 12},
    "combine": {"parts": [{"kind": "infonoise", "every": 6, "warmup_steps": 6}, {"kind": "ant_uw", "every": 3}]},
}  # fmt: skip


def test_every_online_method_is_in_the_list():
    for kind in kinds.names("timesteps"):
        needed = {"combine": {"parts": ["uniform"]}, "curriculum": ONLINE["curriculum"]}
        method = parse({"kind": kind, **needed.get(kind, {})})
        table = build_step_table(config("schedules", "linear"), config("objectives", "v"), method)
        assert not table.changes or kind in ONLINE or kind == "adaptive", kind


@pytest.mark.parametrize("kind", ONLINE)
def test_resuming_in_the_middle_of_an_interval_is_exact(kind):
    whole, first, second = (make(kind, **ONLINE[kind]) for _ in range(3))
    run(whole, range(40), SLOPE)
    run(first, range(17), SLOPE)
    state = first.state_dict()
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    second.load_state_dict(state, step=17)
    assert torch.equal(second.cdf_T, first.cdf_T)
    run(second, range(17, 40), SLOPE)
    for name in ("density", "weight", "cdf_T", "rows_T8"):
        assert torch.equal(getattr(second, name), getattr(whole, name)), name
    assert not torch.equal(whole.rows_T8[:, 4], torch.ones(40)) or kind != "ant_uw"


@pytest.mark.parametrize("kind", ONLINE)
def test_any_number_of_ranks_learns_the_same(kind):
    """Two and four ranks, simulated: their buffers are summed as all_reduce would."""
    tables = {world: [make(kind, **ONLINE[kind]) for _ in range(world)] for world in (1, 2, 4)}
    for number in range(30):
        for world, ranks in tables.items():
            for rank, table in enumerate(ranks):
                step(table, number, SLOPE, rank=(rank, world))
            buffers = [t.session.buffer for t in ranks if t.session and t.session.buffer]
            total = sum(buffer.mine.clone() for buffer in buffers)
            for table in ranks:
                table.refresh(number + 1, lambda tensor, total=total: tensor.copy_(total))
    single = tables[1][0]
    for ranks in tables.values():
        for table in ranks:
            assert torch.equal(table.cdf_T, single.cdf_T)
            assert torch.equal(table.rows_T8, single.rows_T8)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a number, and shapes that depend on values."""

    WAITS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "is_nonzero",
        "aten.equal",
        "unique",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in self.WAITS), name
        if name.startswith(("aten.index.", "aten.index_put")):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ONLINE)
def test_nothing_waits_for_the_device(kind):
    table = make(kind, **ONLINE[kind])
    with NoWaiting():
        for number in range(24):
            losses_3B = torch.rand(3, BATCH)
            table.observe(torch.tensor([number, 0]), torch.arange(BATCH) % 40, losses_3B)
            table.refresh(number + 1)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        table.density.sum().item()


def test_half_an_interval_is_saved_from_all_ranks():
    ranks = [make("ant_uw", every=10) for _ in range(2)]
    for number in range(5):
        for rank, table in enumerate(ranks):
            step(table, number, SLOPE, rank=(rank, 2))
    total = sum(t.session.buffer.mine.clone() for t in ranks)
    states = [t.state_dict(lambda tensor: tensor.copy_(total)) for t in ranks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    alone = make("ant_uw", every=10)
    alone.load_state_dict(states[0], step=5)  # on one rank instead of two
    whole = make("ant_uw", every=10)
    run(alone, range(5, 10), SLOPE)
    run(whole, range(10), SLOPE)
    assert torch.equal(alone.weight, whole.weight)


def test_losses_that_are_not_finite_are_left_out():
    table, clean = make("ant_uw"), make("ant_uw")
    address_2, row_B = torch.tensor([0, 0]), torch.arange(BATCH) % 40
    losses_3B = torch.ones(3, BATCH)
    bad = losses_3B.clone()
    bad[1, 5], bad[2, 9] = torch.nan, torch.inf
    table.observe(address_2, row_B, bad)
    clean.observe(address_2, row_B, losses_3B)
    table.refresh(1)
    clean.refresh(1)
    assert torch.equal(table.weight, clean.weight)


def test_a_method_that_learns_has_to_be_told():
    table = make("loss_second_moment", every=2)
    table.refresh(1)
    with pytest.raises(ValueError, match="learns from the losses, but none was observed"):
        table.refresh(2)


def test_a_state_of_another_method_is_refused():
    state = make("ant_uw").state_dict()
    with pytest.raises(ValueError, match=r"not one of timesteps\.kind=infonoise"):
        make("infonoise").load_state_dict(state, step=1)
    with pytest.raises(ValueError, match="this one is fixed"):
        make("speed").load_state_dict(state, step=1)
    assert make("speed").state_dict() == {}
    make("speed").load_state_dict({}, step=1)


def test_weights_stay_normalised():
    table = make("ant_uw", normalise=True)
    run(table, range(10), SLOPE)
    assert (table.density * table.weight).sum().item() == pytest.approx(1, abs=1e-9)


def test_fdm_warms_its_weight_up():
    """The weight on x0 is held below 5 * 100^(step / 400), so 84 % of EDM's samples are clamped at the start."""
    table = build_step_table(
        config("schedules", "edm"), config("objectives", "fdm"), config("timesteps", "edm")
    )
    gain = table.objective.gain(table.schedule).square()
    for number, ceiling in ((0, 5.0), (200, 50.0), (399, 494.3), (400, 1e9), (500, 1e9)):
        table.refresh(number) if number else None
        found = table.rows_T8[:, 4].double() * gain
        torch.testing.assert_close(found, gain.clamp(max=ceiling), rtol=2e-3, atol=0)
        if number == 0:
            clamped = (gain > 5).double() * table.density
            assert clamped.sum().item() == pytest.approx(0.84, abs=0.005)
    plain = build_step_table(
        config("schedules", "edm"),
        config("objectives", "fdm", clamp_steps=0),
        config("timesteps", "edm"),
    )
    assert (plain.rows_T8[:, 4] - 1).abs().max() < 1e-6
