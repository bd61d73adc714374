"""The U-Net with dropout in real processes: engines, stages, micro-batches and a resume drop and learn the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SETTINGS = {
    "model": "unet",
    "model.size": "tiny",
    "model.width": 16,
    "model.num_blocks": 1,
    "model.dropout": 0.2,
    "train.steps": 4,
    "train.global_batch": 16,
    "checkpoint.every": 2,
    "checkpoint.keep": 4,
    "log.every": 2,
}


@pytest.fixture(scope="module")
def train(launcher_in, tmp_path_factory: pytest.TempPathFactory):
    """train(name, world, overrides) -> its weights after `train.steps`; one folder for all."""
    launcher = launcher_in(tmp_path_factory.mktemp("unets"))

    def weights(name: str, world: int, *overrides: str) -> tuple[Path, dict[str, torch.Tensor]]:
        run = launcher.folder / name
        words = {"run_dir": run, "data.path": launcher.data, **SETTINGS}
        words |= dict(override.split("=", 1) for override in overrides)
        arguments = [f"{key}={value}" for key, value in words.items()]
        launcher.wait(launcher.start(world, ["--config=digits_dit_tiny", *arguments]))
        return run, load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")

    return weights


@pytest.fixture(scope="module")
def alone(train) -> tuple[Path, dict[str, torch.Tensor]]:
    return train("alone", 1, "engine=torch")


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ("engine=torch", "train.micro_batch=4")),
        (2, ("engine=torch",)),
        (2, ("engine.zero=1", "train.micro_batch=4")),
        (2, ("engine.zero=3",)),
    ],
    ids=["micro-batches", "ddp", "zero1", "zero3"],
)
def test_any_split_of_a_batch_learns_the_same(train, alone, request, world, overrides) -> None:
    _, expected = alone
    _, found = train(request.node.callspec.id, world, *overrides)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4, msg=name)
    # What would remain if each drew dropout of its own: Adam's first steps move every weight by the rate.
    assert max((found[name] - expected[name]).abs().max().item() for name in found) < 1e-3


def test_dropout_is_on_in_training_and_a_resume_repeats_it(train, alone) -> None:
    run, expected = alone
    _, without = train("without", 1, "engine=torch", "model.dropout=0")
    assert any(not torch.allclose(without[name], expected[name], atol=1e-4) for name in expected)
    again = run.parent / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    _, resumed = train("again", 1, "engine=torch", "checkpoint.resume=must")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
