"""The largest |1 + scale| of the adaLN layers, against the modulations themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from speed_engine import config as configuration
from speed_engine.distributed import Processes
from speed_engine.training import assembly, scales

ALONE = Processes(0, 1, 0, torch.device("cpu"))


def network(tmp_path) -> Any:
    settings = [f"data.path={tmp_path}", "model.depth=2", "engine=torch"]
    model: Any = assembly.build(configuration.load("digits_dit_tiny", settings), ALONE).model
    with torch.no_grad():
        for layer in model.projections():
            layer.bias.normal_(generator=torch.Generator().manual_seed(1))
        model.blocks[1].adaLN_modulation[1].bias[4 * 128 + 7] = -9.0  # a scale of the MLP's
        model.blocks[0].adaLN_modulation[1].bias[5 * 128 + 7] = 50.0  # a gate
    return model


def call(model: Any) -> None:
    model(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0]), label=torch.tensor([1, 2]))


def test_the_largest_scale_and_no_gate(tmp_path):
    model = network(tmp_path)
    watched = scales.of(model, ALONE.device, SimpleNamespace(compile="off"))
    assert watched is not None and len(watched.modules) == 3
    call(model)
    assert watched.read(ALONE) == 0.0  # nothing was hooked
    for _ in range(2):
        with watched.noting():
            call(model)
        assert abs(watched.read(ALONE) - 8.0) < 0.5  # 1 - 9, and the weights are zero at first
    assert not any(each._forward_pre_hooks for each in watched.modules)


def test_where_nothing_can_be_seen(tmp_path):
    model = network(tmp_path)
    assert scales.of(model, ALONE.device, SimpleNamespace(compile="block")) is None
    assert scales.of(model, ALONE.device, SimpleNamespace(cuda_graph=True)) is None
    assert scales.of(torch.nn.Linear(2, 2), ALONE.device, SimpleNamespace()) is None
