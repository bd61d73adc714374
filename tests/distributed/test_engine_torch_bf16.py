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


# A large eps makes the update proportional to the gradient: a wrong factor would show.
COMMON = (*BF16, "train.steps=10", "checkpoint.every=1", "checkpoint.keep=20", "log.every=1")
COMMON += ("optim.eps=0.1", "optim.lr=0.02", "optim.warmup_steps=0")
RUNS = {"one": (1, 16), "two": (2, 8), "two_micro": (2, 4)}  # processes, micro-batch


@pytest.fixture(scope="module")
def folder(launcher_in, tmp_path_factory) -> Path:
    """All of RUNS, 10 steps without a break."""
    launcher = launcher_in(tmp_path_factory.mktemp("bf16"))
    for name, (world, micro) in RUNS.items():
        launcher.train(name, *COMMON, f"train.micro_batch={micro}", world=world)
    return launcher.folder


def test_processes_and_micro_batches_train_the_same(folder):
    """Against one process that does the whole batch; every gradient is rounded to bf16 (2^-9) before it is added."""
    for name in ("two", "two_micro"):
        assert losses(folder / name) == pytest.approx(losses(folder / "one"), rel=1e-3)
        for which in ("model", "ema"):
            first, one = (weights(folder / "one", step, which) for step in (1, 10))
            found = weights(folder / name, 10, which)
            moved = torch.cat([(one[k] - first[k]).flatten() for k in one]).norm()
            gap = torch.cat([(found[k] - one[k]).flatten() for k in one]).norm()
            assert 0 < gap < 0.005 * moved, (name, which)


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_bit_exact(folder, launcher, name):
    """10 steps at once, against the same run continued from its checkpoint at step 5."""
    (world, micro), whole, resumed = RUNS[name], folder / name, launcher.folder / "resumed"
    shutil.copytree(whole, resumed)
    for later in range(6, 11):
        shutil.rmtree(checkpoint(resumed, later))
    micro_batch = f"train.micro_batch={micro}"
    launcher.train("resumed", *COMMON, micro_batch, "checkpoint.resume=must", world=world)
    one, other = (
        load_file(checkpoint(run, 10) / "state" / "shard-00000.safetensors")
        for run in (whole, resumed)
    )
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    assert one.keys() == other.keys() and len({key.split("/")[0] for key in one}) >= 4
    assert not [key for key, tensor in one.items() if not torch.equal(tensor, other[key])]
    for which in ("model", "ema"):
        found = weights(resumed, 10, which)
        assert all(torch.equal(v, found[k]) for k, v in weights(whole, 10, which).items())
    assert losses(resumed) == losses(whole)
