"""`engine.precision: auto` is what the device is good at, and never float32 products on a GPU by omission."""

from __future__ import annotations

import pytest
import torch

from speed_engine.engines import deepspeed, with_precision
from speed_engine.engines.optimizer import Config as Optim
from speed_engine.engines.torch import Config as Plain
from speed_engine.kinds import Section


@pytest.mark.parametrize(
    ("config", "device", "optimizer", "precision"),
    [
        (Plain(), "cuda", "adamw_ema", "bf16"),
        (Plain(), "cuda", "torch_fused", "autocast"),
        (Plain(), "cpu", "adamw_ema", "fp32"),
        (deepspeed.Config(), "cuda", "torch_fused", "bf16"),
        (deepspeed.Config(), "cpu", "adamw_ema", "fp32"),
        (Plain(precision="fp32"), "cuda", "adamw_ema", "fp32"),
    ],
)
def test_what_auto_is(
    config: Plain | deepspeed.Config, device: str, optimizer: str, precision: str
) -> None:
    assert with_precision(config, torch.device(device), optimizer).precision == precision


def test_an_outside_engine_without_a_precision_is_left_alone() -> None:
    section = Section()
    assert with_precision(section, torch.device("cuda"), "adamw_ema") is section


def test_a_users_float32_sums_are_left_to_deepspeeds_own_norm() -> None:
    """Its wrapper for them refuses to go without; everywhere else adamw_ema looks at the gradient itself."""
    optim = Optim()
    for stage, sums, ours in ((1, "fp32", False), (2, "fp32", True), (1, None, True)):
        settings = {
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "data_types": {"grad_accum_dtype": sums},
        }
        assert deepspeed._guard_ourselves(settings, optim) is ours
        assert settings["gradient_clipping"] == (0.0 if ours else 1.0)
