"""The learned sampler: it finds the steps at which the network can improve, resumes exactly, and agrees across ranks.

The network is one number theta: it answers theta * eps on the noisier half of the steps and 0 on
the other. An update moves theta by the share of the batch that was drawn there, from the same start
every time, so the noisier half is where training pays.
"""

import importlib
import math
import sys
from typing import Any

import pytest
import torch
from sklearn.feature_selection import f_regression

from speed_engine.__main__ import main
from speed_engine.diffusion_step import diffusion_loss, evaluator
from speed_engine.step_table import StepTable, build_step_table
from speed_engine.timesteps import adaptive, parse
from speed_engine.timesteps.online.beta_policy import BetaPolicy, Halved
from speed_engine.timesteps.online.feature_selection import FeatureSelection
from speed_engine.timesteps.online.policy import Reach

BATCH, ROWS = 16, 40
BACKENDS = {"noise": "reference", "loss": "reference"}


def policy_of(table: StepTable) -> Any:
    """The table's policy, a module whose parts are taken apart here."""
    assert table.policy is not None
    return table.policy


def make(**options) -> StepTable:
    def config(folder: str, kind: str, **values):
        return importlib.import_module(f"speed_engine.{folder}.{kind}").Config(**values)

    options = {"every": 1, "sweep_every": 5, "sweep_rows": 20, "num_selected": 2} | options
    table = build_step_table(
        config("schedules", "linear", num_steps=ROWS),
        config("objectives", "epsilon"),
        parse({"kind": "adaptive", **options}),
    )
    table.start(BATCH, (2, 4, 4))
    return table


class Toy:
    """The network; `calls` counts its evaluations."""

    def __init__(self, table: StepTable) -> None:
        self.sigma_T, self.theta, self.calls = table.schedule.sigma.float(), 0.0, 0

    def forward(self, x_t: torch.Tensor, time_B: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        row_B = time_B.long()
        factor_B = self.theta * (row_B >= ROWS // 2) / self.sigma_T[row_B]
        return x_t * factor_B[:, None, None, None]


def lesson(table: StepTable, toy: Toy, number: int, reach: Reach | None = None) -> torch.Tensor:
    """One training step; the rows drawn."""
    reach = reach or Reach()
    share = BATCH // reach.num_ranks
    images = torch.randn(BATCH, 2, 4, 4, generator=torch.Generator().manual_seed(number)) * 0.01
    x0 = images[reach.rank * share : (reach.rank + 1) * share]
    address_2 = torch.tensor([number, reach.rank * share])
    _, row_B, _ = table.noise(x0, address_2, seed=1, num_slots=BATCH, backend="reference")
    toy.theta = 0.0
    evaluate = evaluator(table, toy.forward, number, seed=1, backends=BACKENDS)
    table.before_update(number, x0, {}, row_B, evaluate, reach)
    toy.theta = 0.2 * (row_B >= ROWS // 2).float().mean().item()
    table.after_update(number, evaluate, reach)
    table.refresh(number + 1)
    return row_B


def test_the_policy_goes_where_training_pays():
    table = make(entropy=0.0)
    toy = Toy(table)
    assert table.density[ROWS // 2 :].sum().item() == pytest.approx(0.5, abs=0.01)
    drawn = [lesson(table, toy, number) for number in range(120)]
    selected = policy_of(table).swept_R[policy_of(table).selection.best]
    assert (selected >= ROWS // 2).all()  # the steps that never change predict nothing
    assert table.density[ROWS // 2 :].sum().item() > 0.75
    late = torch.cat(drawn[-20:])
    assert (late >= ROWS // 2).float().mean().item() == pytest.approx(
        table.density[ROWS // 2 :].sum().item(), abs=0.1
    )


def test_entropy_keeps_the_policy_broad():
    broad, narrow = make(entropy=2.0), make(entropy=0.0)
    for table in (broad, narrow):
        toy = Toy(table)
        for number in range(40):
            lesson(table, toy, number)
    assert broad.density[ROWS // 2 :].sum() < narrow.density[ROWS // 2 :].sum()


def test_resuming_is_exact():
    whole, first, second = make(), make(), make()
    for number in range(24):
        lesson(whole, Toy(whole), number)
    for number in range(11):
        lesson(first, Toy(first), number)
    second.load_state_dict(first.state_dict(), step=11)
    for number in range(11, 24):
        lesson(second, Toy(second), number)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert torch.equal(lesson(second, Toy(second), 24), lesson(whole, Toy(whole), 24))


def test_rows_are_drawn_from_the_policy():
    """Chi-square of 20000 draws for one sample against the policy's own probabilities."""
    table = make()
    torch.manual_seed(0)
    policy_of(table).adam.value += 0.02 * torch.randn_like(policy_of(table).adam.value)
    x0 = torch.randn(1, 2, 4, 4).expand(500, 2, 4, 4)
    found = torch.zeros(ROWS)
    for number in range(40):
        address_2 = torch.tensor([number, 0])
        _, row_B, time_B = table.noise(x0, address_2, seed=5, num_slots=500, backend="reference")
        found += torch.bincount(row_B, minlength=ROWS)
        assert torch.equal(time_B, row_B.float())
    expected = policy_of(table).network(x0[:1])[0].exp().detach() * 20_000
    statistic = ((found - expected).square() / expected).sum().item()
    assert statistic < ROWS + 5 * math.sqrt(2 * ROWS)


def test_noise_at_chosen_rows_is_the_same_noise():
    """Every sample gets the row that was chosen for it, and the noise of its address."""
    table = make()
    x0 = torch.randn(BATCH, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    row_B = (torch.arange(BATCH) * 7) % ROWS
    address_2 = torch.tensor([3, 32])
    for backend in ("reference", "cpp"):
        x_t, used_B, time_B = table.noise_at(x0, row_B, address_2, seed=9, backend=backend)
        assert torch.equal(used_B, row_B)
        assert torch.equal(time_B, row_B.float())
        from speed_kernels import philox

        slot_B = 32 + torch.arange(BATCH)
        eps = philox.normals(9, 3, slot_B, philox.STREAM_EPS, 32).view_as(x0)
        a_B, b_B = table.rows_T8[row_B, 0], table.rows_T8[row_B, 1]
        expected = a_B[:, None, None, None] * x0 + b_B[:, None, None, None] * eps
        torch.testing.assert_close(x_t, expected.float(), rtol=1e-5, atol=1e-6)


def test_the_cost_is_what_the_settings_say():
    """40 steps at the defaults: 2 x 3 evaluations of the batch, and 2 x 125 / batch for a sweep every 200."""
    table = make(every=40, sweep_every=200, sweep_rows=40, num_selected=3)
    toy = Toy(table)
    for number in range(400):
        lesson(table, toy, number)
    sweeps = 2 * math.ceil(ROWS / BATCH) * 2
    assert toy.calls == 10 * 2 * 3 + sweeps


def test_two_ranks_learn_as_one():
    """Both ranks hold half of the batch; every all_reduce is a sum, simulated by running them in turn."""
    import threading

    barrier, slots = threading.Barrier(2), {}

    def all_reduce_of(rank):
        def all_reduce(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            tensor.copy_(total)

        return all_reduce

    tables = [make(), make()]

    def work(rank: int) -> None:
        toy = Toy(tables[rank])
        for number in range(12):
            lesson(tables[rank], toy, number, Reach(rank, 2, all_reduce_of(rank)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for name, tensor in tables[0].state_dict().items():
        assert torch.equal(tensor, tables[1].state_dict()[name]), name
    assert policy_of(tables[0]).selection.count == 3


def test_nothing_waits_for_the_device():
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "aten.equal")
            assert not any(word in str(func) for word in waits), str(func)
            return func(*args, **(kwargs or {}))

    table = make()
    x0, row_B = torch.randn(BATCH, 2, 4, 4), torch.arange(BATCH)
    policy, reach = policy_of(table), Reach()

    def evaluate(x0, conditions, row_N, first_slot):
        return row_N.float() / ROWS

    with NoWaiting():
        for number in range(12):
            policy.draw(x0, torch.arange(BATCH) << 27)
            policy.before(number, x0, {}, row_B, evaluate, reach)
            policy.after(evaluate, reach)
            table.refresh(number + 1)


@pytest.mark.parametrize("shape", [(3, 32, 32), (4, 7, 5), (8, 16), (5,), (2, 3, 8, 8)])
def test_any_sample_shape(shape):
    network = BetaPolicy(shape, 100)
    log_BT = network(torch.randn(3, *shape))
    assert log_BT.shape == (3, 100)
    torch.testing.assert_close(log_BT.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(
        network.shapes(torch.randn(2, *shape)), torch.full((2, 2), 0.974), rtol=0, atol=1e-3
    )
    beta = torch.distributions.Beta(0.974077, 0.974077)
    middles = (torch.arange(100) + 0.5) / 100
    expected = beta.log_prob(middles)
    torch.testing.assert_close(log_BT[0], expected - expected.logsumexp(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 8), (7, 3)])
def test_halved_is_max_pooling(size):
    x = torch.randn(2, 3, *size)
    assert torch.equal(Halved()(x), torch.nn.MaxPool2d(2, ceil_mode=True)(x))


@pytest.mark.parametrize("size", [(8, 8), (11, 20), (32, 32), (70, 41)])
def test_the_first_layer_sees_4x4_averages(size):
    """Both ways of pooling give what nn.AdaptiveAvgPool2d(4) gives, and the same gradient."""
    network = BetaPolicy((3, *size), 10)
    first = network.head[0]
    features = network.image(torch.randn(2, 3, *size)).detach()
    wanted = first(torch.nn.AdaptiveAvgPool2d(4)(features).flatten(1))
    found = network._pooled(features.flatten(2), first)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(out.square().sum(), first.weight)[0] for out in (found, wanted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_feature_selection_is_univariate_regression():
    generator = torch.Generator().manual_seed(0)
    selection = FeatureSelection(12, 3, 20, torch.device("cpu"))
    first = selection.best.clone()
    sweeps = torch.randn(26, 12, generator=generator, dtype=torch.float64)
    sweeps[:, 4] = sweeps.sum(1) * 0.5 + 0.1 * sweeps[:, 4]
    sweeps[:, 7] = 0.0
    for number, sweep in enumerate(sweeps):
        selection.add(sweep)
        if number < 2:
            assert torch.equal(selection.best, first)
    kept = sweeps[-20:]
    statistic, _ = f_regression(kept[:, torch.arange(12) != 7].numpy(), kept.sum(1).numpy())
    expected = torch.tensor(statistic)
    torch.testing.assert_close(
        selection.statistic()[torch.arange(12) != 7], expected, rtol=1e-6, atol=1e-9
    )
    assert selection.statistic()[7] == 0
    assert 4 in selection.best.tolist()


def test_bits_per_error_is_the_kl_of_a_fixed_large_variance():
    from speed_engine.schedules import linear, rectified_flow

    on = linear.build(linear.Config())
    assert on.betas is not None
    bits = adaptive.bits_per_error(on)
    t, error = 500, 0.3
    gap = on.betas[t] * on.alpha[t - 1] / (1 - on.alpha_bar[t]) * error
    expected = gap.square() / (2 * on.betas[t]) / math.log(2)
    assert (bits[t] * error**2).item() == pytest.approx(expected.item(), rel=1e-9)
    # at t = 0 the variance is the posterior's of t = 1, and x_{t-1} is x0 itself
    posterior = on.betas[1] * (1 - on.alpha_bar[0]) / (1 - on.alpha_bar[1])
    assert posterior.item() == pytest.approx(5.46e-5, rel=1e-2)  # beta_0 is 1e-4
    first = 1 / (2 * posterior) / math.log(2)
    assert bits[0].item() == pytest.approx(first.item(), rel=1e-9)
    posteriors = on.betas * on.alpha.roll(1) / (1 - on.alpha_bar)
    others = posteriors.square() / (2 * on.betas) / math.log(2)
    torch.testing.assert_close(bits[1:], others[1:], rtol=1e-9, atol=0)
    # in fine steps both forms agree: half the loss of SNR
    fine = linear.build(linear.Config(num_steps=4000))
    lost = (fine.snr[1999] - fine.snr[2000]) / (2 * math.log(2))
    assert adaptive.bits_per_error(fine)[2000].item() == pytest.approx(lost.item(), rel=2e-2)
    flow = adaptive.bits_per_error(rectified_flow.build(rectified_flow.Config(num_cells=512)))
    assert (flow >= 0).all()
    assert torch.isfinite(flow).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_reward_at_t_0_through_the_command_line(monkeypatch, capsys, schedule):
    """An error of x0 at t = 0 counts 1 / (2 posterior_variance[1] ln 2) bits."""
    seen = []

    def shown(table, form):
        seen.append(table)
        return "{}"

    monkeypatch.setattr("speed_engine.reports.table.report", shown)
    words = ["table", f"schedule={schedule}", "timesteps=adaptive", "--json"]
    monkeypatch.setattr(sys, "argv", ["speed_engine", *words])
    assert main() == 0, capsys.readouterr().err
    table = seen[0]
    bar = table.schedule.alpha_bar
    variance = (1 - bar[1] / bar[0]) * (1 - bar[0]) / (1 - bar[1])
    expected = 1 / (2 * variance * math.log(2))
    assert policy_of(table).bits_T[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_what_it_needs_is_asked_for():
    table = make()
    with pytest.raises(ValueError, match="before and after every update"):
        diffusion_loss(lambda x, t: x, torch.zeros(2, 2, 4, 4), table, step=0, seed=0)
    bare = build_step_table(
        *(
            importlib.import_module(f"speed_engine.{m}").Config()
            for m in ("schedules.linear", "objectives.epsilon")
        ),
        parse("adaptive"),
    )
    with pytest.raises(ValueError, match="needs the shape of a sample"):
        bare.start(16)
    with pytest.raises(ValueError, match=r"call table\.start"):
        bare.noise(torch.zeros(1, 2), torch.tensor([0, 0]), seed=0, num_slots=1)


def test_the_correction_weighs_by_the_inverse_density():
    table = make(corrected=True)
    for number in range(10):
        lesson(table, Toy(table), number)
    torch.testing.assert_close(table.density * table.weight, torch.full((ROWS,), 1 / ROWS).double())


def test_a_broken_loss_teaches_nothing():
    table = make()
    toy = Toy(table)
    lesson(table, toy, 0)
    before = policy_of(table).adam.value.clone()
    policy, x0 = policy_of(table), torch.zeros(BATCH, 2, 4, 4)
    values = iter([0.5, 0.5, float("nan"), 0.5])

    def evaluate(x0, conditions, row_N, first_slot):
        return torch.full(row_N.shape, next(values))

    policy.before(1, x0, {}, torch.arange(BATCH), evaluate, Reach())
    policy.after(evaluate, Reach())
    assert policy.adam.value.isfinite().all()
    assert (policy.adam.value - before).abs().max() < 0.02  # momentum at most
    table.refresh(2)
    assert table.density.sum().item() == pytest.approx(1)
