"""Three lines in somebody else's loop: the loss against formulas, its gradient, learning, and adaptive methods."""

import pytest
import torch
from speed_kernels import philox
from torch import nn

from speed_engine import StepTable, diffusion_loss
from speed_engine.data import Batch
from speed_engine.diffusion_step import losses

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)


def x0_of(batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_the_loss_is_the_formula(backend):
    table = StepTable.from_alphas_cumprod(ALPHAS_CUMPROD, timesteps="speed")
    x0, calls = x0_of(), []

    def model(x_t, time_B):
        calls.append((x_t, time_B))
        return 0.5 * x_t

    loss = diffusion_loss(model, x0, table, step=7, seed=11, backend=backend)
    (x_t, time_B) = calls[0]
    row_B = time_B.long()
    eps = philox.normals(11, 7, torch.arange(6), philox.STREAM_EPS, 48).view(6, 3, 4, 4)
    bar_B = ALPHAS_CUMPROD[row_B].view(6, 1, 1, 1)
    torch.testing.assert_close(
        x_t.double(), bar_B.sqrt() * x0 + (1 - bar_B).sqrt() * eps, rtol=1e-5, atol=1e-5
    )
    error_B = (0.5 * x_t.double() - eps).square().mean(dim=(1, 2, 3))
    expected = (table.weight[row_B] * error_B).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_the_gradient_reaches_the_network():
    table = StepTable.from_alphas_cumprod(ALPHAS_CUMPROD, timesteps="min_snr", objective="v")
    scale = nn.Parameter(torch.tensor(0.3))
    arguments = {"step": 0, "seed": 0}
    loss = diffusion_loss(lambda x_t, time_B: scale * x_t, x0_of(), table, **arguments)
    loss.backward()
    assert scale.grad is not None
    with torch.no_grad():
        higher, lower = (
            diffusion_loss(lambda x_t, time_B: value * x_t, x0_of(), table, **arguments)  # noqa: B023
            for value in (0.301, 0.299)
        )
    assert scale.grad.item() == pytest.approx((higher - lower).item() / 0.002, rel=2e-2)


def test_conditions_outputs_and_places():
    table = StepTable.from_alphas_cumprod(ALPHAS_CUMPROD, timesteps="uniform")

    class Output:
        def __init__(self, sample):
            self.sample = sample

    def model(x_t, time_B, labels, scale):
        assert labels.shape == time_B.shape
        return Output(scale * x_t)

    def told(a, b):
        return {"labels": torch.arange(6)[a:b], "scale": 0.1}

    options = {"step": 1, "seed": 2}
    x0 = x0_of(6)
    whole = diffusion_loss(model, x0, table, conditions=told(0, 6), **options)
    halves = [
        diffusion_loss(
            model, x0[a:b], table, conditions=told(a, b), first_slot=a, num_slots=6, **options
        )
        for a, b in ((0, 3), (3, 6))
    ]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"first_slot": 3}, "given first_slot without num_slots"),
        ({"num_slots": 12}, "given num_slots without first_slot"),
        ({"first_slot": 8, "num_slots": 12}, "no place for 6 samples"),
        ({"first_slot": -1, "num_slots": 12}, "no place for 6 samples"),
    ],
)
def test_half_a_place_in_the_batch_is_refused(place, message):
    table = StepTable.from_alphas_cumprod(ALPHAS_CUMPROD)
    with pytest.raises(ValueError, match=message):
        diffusion_loss(lambda x_t, time_B: x_t, x0_of(6), table, step=0, seed=0, **place)


def test_a_tuple_is_its_first_and_nothing_else_is_guessed():
    table = StepTable.from_alphas_cumprod(ALPHAS_CUMPROD)
    options = {"step": 0, "seed": 0}
    plain = diffusion_loss(lambda x_t, time_B: 0.5 * x_t, x0_of(), table, **options)
    tupled = diffusion_loss(lambda x_t, time_B: (0.5 * x_t,), x0_of(), table, **options)
    assert torch.equal(plain, tupled)
    with pytest.raises(ValueError, match="returned a dict"):
        diffusion_loss(lambda x_t, time_B: {"out": x_t}, x0_of(), table, **options)


def test_several_passes_share_the_loss():
    table = StepTable.from_alphas_cumprod(ALPHAS_CUMPROD)
    batch = Batch(x0_of(), {}, torch.tensor([0, 0]))

    def network(x_t, time_B, scale):
        return scale * x_t

    def once(scale):
        passes = [(1.0, {"scale": scale})]
        return losses(table, network, batch, seed=0, num_slots=6, passes=passes)

    passes = [(0.75, {"scale": torch.tensor(0.5)}), (0.25, {"scale": torch.tensor(0.1)})]
    both = losses(table, network, batch, seed=0, num_slots=6, passes=passes)
    one, other = once(torch.tensor(0.5)), once(torch.tensor(0.1))
    torch.testing.assert_close(both.total, 0.75 * one.total + 0.25 * other.total)
    torch.testing.assert_close(both.each_3B, 0.75 * one.each_3B + 0.25 * other.each_3B)
    assert torch.equal(both.row_B, one.row_B)


def test_adaptive_methods_learn_in_a_foreign_loop():
    method = {"kind": "loss_second_moment", "every": 1, "history": 1}
    table = StepTable.from_alphas_cumprod(ALPHAS_CUMPROD[::50], timesteps=method)
    before = table.density.clone()
    for step in range(60):
        diffusion_loss(lambda x_t, time_B: 0.5 * x_t, x0_of(32), table, step=step, seed=0)
    assert (table.density - before).abs().sum() > 0.1
    assert table.density.sum().item() == pytest.approx(1)


def test_learned_variance():
    table = StepTable.from_alphas_cumprod(ALPHAS_CUMPROD, learned_variance=True)
    head = nn.Conv2d(3, 6, 1)
    diffusion_loss(lambda x_t, time_B: head(x_t), x0_of(), table, step=0, seed=0).backward()
    assert head.weight.grad is not None
    assert (head.weight.grad[3:] != 0).any()


def test_flow_matching():
    continuous = StepTable.from_flow()
    assert continuous.num_rows == 16384
    t = continuous.schedule.coordinate
    torch.testing.assert_close(continuous.time_T.double(), 1000 * t, rtol=1e-6, atol=0)
    # drawn from cells of equal mass of logit-normal(0, 1): the median is 1/2
    assert t[8192].item() == pytest.approx(0.5, abs=1e-3)
    assert t[int(16384 * 0.841345)].item() == pytest.approx(0.7311, abs=1e-3)
    discrete = StepTable.from_flow(torch.linspace(1, 0.001, 1000), timesteps="uniform")
    assert discrete.time_T[0].item() == pytest.approx(1.0)
    assert discrete.time_T[-1].item() == pytest.approx(1000)
    x0 = x0_of()
    loss = diffusion_loss(lambda x_t, time_B: 0 * x_t, x0, discrete, step=0, seed=0)
    eps = philox.normals(0, 0, torch.arange(6), philox.STREAM_EPS, 48).view(6, 3, 4, 4)
    assert loss.item() == pytest.approx((eps - x0).square().mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="leave out the final 0"):
        StepTable.from_flow(torch.tensor([1.0, 0.5, 0.0]))


def test_noise_levels():
    table = StepTable.from_sigmas(torch.tensor([80.0, 1.0, 0.5, 0.002]), timesteps="edm")
    torch.testing.assert_close(table.schedule.sigma, torch.tensor([0.002, 0.5, 1, 80]).double())
    torch.testing.assert_close(table.time_T.double(), table.schedule.sigma.log() / 4)
    torch.testing.assert_close(table.weight, torch.ones(4).double())
    # the network's input has unit variance where x0 has standard deviation 0.5
    a, b = table.rows_T8[:, 0], table.rows_T8[:, 1]
    torch.testing.assert_close(a.square() * 0.25 + b.square(), torch.ones(4))
    with pytest.raises(ValueError, match="leave out the final 0"):
        StepTable.from_sigmas(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="did you mean 'edm'"):
        StepTable.from_sigmas(torch.tensor([1.0, 0.5]), objective="emd")


def test_continuous_time_has_no_learned_variance():
    from speed_engine.objectives import flow
    from speed_engine.schedules import rectified_flow
    from speed_engine.step_table import build_step_table
    from speed_engine.timesteps import uniform

    with pytest.raises(ValueError, match="learned_variance needs a discrete schedule"):
        build_step_table(rectified_flow.Config(), flow.Config(), uniform.Config(), True)


@pytest.mark.parametrize(
    ("x0", "said"),
    [([1.0], "given a list"), (torch.zeros(0, 2), "no sample"), (torch.tensor(1.0), "no sample")],
)
def test_what_is_no_batch_is_told(x0, said):
    table = StepTable.from_alphas_cumprod(torch.linspace(0.99, 0.01, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=said):
        diffusion_loss(lambda x, time: x, x0, table, step=0, seed=0)
