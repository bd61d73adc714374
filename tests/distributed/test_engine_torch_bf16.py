"""`engine: torch` in bf16, in real processes: DDP over bf16 gradients, float32 sums of micro-batches, resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

BF16 = ("engine=torch", "engine.precision=bf16")


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def weights(run: Path, step: int, which: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint(run, step) / f"{which}.safetensors")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_processes_and_micro_batches_train_the_same(launcher):
    """Against one process that does the whole batch; every gradient is rounded to bf16 (2^-9) before it is added. A
    large eps makes the update proportional to the gradient: a wrong factor would show."""
    common = (*BF16, "train.steps=10", "checkpoint.every=1", "checkpoint.keep=20", "log.every=1")
    common += ("optim.eps=0.1", "optim.lr=0.02", "optim.warmup_steps=0")
    settings = {"one": (1, 16), "two": (2, 8), "two_micro": (2, 4)}
    for name, (world, micro) in settings.items():
        launcher.train(name, *common, f"train.micro_batch={micro}", world=world)
    folder = launcher.folder
    for name in ("two", "two_micro"):
        assert losses(folder / name) == pytest.approx(losses(folder / "one"), rel=1e-3)
        for which in ("model", "ema"):
            first, one = (weights(folder / "one", step, which) for step in (1, 10))
            found = weights(folder / name, 10, which)
            moved = torch.cat([(one[k] - first[k]).flatten() for k in one]).norm()
            gap = torch.cat([(found[k] - one[k]).flatten() for k in one]).norm()
            assert 0 < gap < 0.005 * moved, (name, which)


@pytest.mark.parametrize(("world", "micro"), [(1, 16), (2, 8), (2, 4)])
def test_resume_is_bit_exact(launcher, world, micro):
    """6 steps at once, against the same run continued from its checkpoint at step 3."""
    folder = launcher.folder
    common = ("train.steps=6", "checkpoint.every=3", f"train.micro_batch={micro}", *BF16)
    launcher.train("whole", *common, world=world)
    shutil.copytree(folder / "whole", folder / "resumed")
    shutil.rmtree(checkpoint(folder / "resumed", 6))
    launcher.train("resumed", *common, "checkpoint.resume=must", world=world)
    one, other = (
        torch.load(checkpoint(folder / run, 6) / "state" / "state.pt", weights_only=True)
        for run in ("whole", "resumed")
    )
    assert {tensor.dtype for tensor in one["model"].values()} == {torch.float32}
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for index, state in one["optimizer"]["state"].items():
        assert all(torch.equal(v, other["optimizer"]["state"][index][k]) for k, v in state.items())
    for which in ("model", "ema"):
        found = weights(folder / "resumed", 6, which)
        assert all(torch.equal(v, found[k]) for k, v in weights(folder / "whole", 6, which).items())
