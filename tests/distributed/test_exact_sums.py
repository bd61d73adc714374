"""`train.exact_sums`: one, two and four processes train and are judged by the same bits, a kill among them."""

import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed.test_training import metrics

SETTINGS = (
    "engine=torch",
    "train.exact_sums=true",
    "train.micro_batch=2",
    "train.steps=12",
    "model.depth=1",
    "checkpoint.every=4",
    "checkpoint.keep=9",
    "log.every=3",
    "validation.every=3",
    "validation.samples=130",  # three blocks: two processes share them, and one of four has none
    "validation.rows=1",
)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, moments and averages, the sums of the open interval, and what is exported."""
    files = ("state/shard-00000", "model", "ema", "interval")
    found = {name: load_file(checkpoint(run, step) / f"{name}.safetensors") for name in files}
    return {f"{name} {key}": each for name, values in found.items() for key, each in values.items()}


def test_one_two_and_four_processes_train_the_same_bits(launcher):
    """One process all the way; two that are killed, then four that go on from what was saved."""
    launcher.train("one", *SETTINGS)
    one, other = launcher.folder / "one", launcher.folder / "other"
    running = launcher.start(2, launcher.arguments("other", *SETTINGS))
    deadline = time.monotonic() + 120
    while not checkpoint(other, 4).exists():
        assert time.monotonic() < deadline and running[0].poll() is None
        time.sleep(0.002)
    for each in running:
        each.kill()
        each.communicate()
    assert not checkpoint(other, 12).exists()
    launcher.train("other", *SETTINGS, "checkpoint.resume=must", world=4)
    for step in (4, 8, 12):
        expected, found = state(one, step), state(other, step)
        assert expected.keys() == found.keys() and len(expected) > 50
        assert not [key for key, value in expected.items() if not torch.equal(value, found[key])]
    assert metrics(one) == metrics(other)
    judged = [
        [line[f"validation_{what}"] for what in ("loss", "loss_se", "v")] for line in metrics(other)
    ]
    assert (
        len(judged) == 4 and judged[0] != judged[3]
    )  # the first by two processes, the others by four
    plain = ("train.exact_sums=false", "train.steps=8")
    launcher.train("plain", *SETTINGS, *plain, world=2)
    expected, found = (
        load_file(checkpoint(run, 8) / "model.safetensors")
        for run in (one, launcher.folder / "plain")
    )
    apart = [key for key, value in expected.items() if not torch.equal(value, found[key])]
    assert apart, "the plain sums of two processes are the same bits: this test could not fail"
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-5)
