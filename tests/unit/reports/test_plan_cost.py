"""What a plan predicts, beside numbers that were worked out by hand."""

import pytest
import torch
from torch import nn

from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.reports.plan_cost import (
    Cluster,
    cluster,
    kept_for_backward,
    smallest_card,
    step_cost,
)


def test_bytes_and_times_of_a_step():
    """10^9 parameters of two bytes on 4 x 4 processes: each sends 2 x 2 GB x 15/16 through the slower wire."""
    where = Cluster(4, 4, tflops=100.0, told="", inside=200.0, network=10.0)
    cost = step_cost(where, macs=1e12, parameters=10**9, gradient_bytes=2, zero=1, batch=10)
    assert cost.wire_bytes == 3.75e9
    assert cost.wire_s == pytest.approx(0.375) and cost.products_s == pytest.approx(0.6)
    assert cost.worst == pytest.approx(0.6 / 0.975) and cost.best == 0.6 / max(0.6, 0.2 + 0.375)
    third = step_cost(where, macs=1e12, parameters=10**9, gradient_bytes=2, zero=3, batch=10)
    assert third.wire_bytes == 1.5 * cost.wire_bytes
    one = Cluster(1, 4, tflops=100.0, told="", inside=200.0, network=10.0)
    inside = step_cost(one, macs=1e12, parameters=10**9, gradient_bytes=2, zero=1, batch=10)
    assert inside.wire_s == pytest.approx(3e9 / 200e9) and inside.best == 1
    alone = Cluster(1, 1, tflops=100.0, told="", inside=200.0, network=10.0)
    assert step_cost(alone, 1e12, 10**9, 2, 1, 10).wire_bytes == 0


def test_rates_are_stated_or_a_datasheets():
    stated = cluster(2, 8, 123.0, 200.0, 50.0)
    assert stated is not None and (stated.processes, stated.tflops) == (16, 123.0)
    taken = cluster(1, 8, None, 200.0, 50.0)
    assert taken is not None and "40% of the datasheet of NVIDIA" in taken.told
    if not torch.cuda.is_available():
        assert cluster(1, None, None, 200.0, 50.0) is None


@pytest.mark.parametrize(("need", "said"), [(1e9, "16 GB"), (40e9, "80 GB"), (1e12, "no GPU")])
def test_the_smallest_card(need, said):
    assert said in smallest_card(need)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor, time_B: torch.Tensor) -> torch.Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_is_kept_is_counted(dtype, size):
    """The input, and the hidden values before and after SiLU: 4 + 8 + 8; weights are not counted."""
    model = Small().to("meta")
    facts = Facts((4,), Space.pixels(1), {})
    assert kept_for_backward(model, facts, dtype) == (4 + 8 + 8) * size
