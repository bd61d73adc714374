"""Steps that are not finite: noted with their samples, gone back from, their data left out, also after a resume."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from speed_engine.data import order

BATCH, BAD = 16, (6, 7)


def samples(step: int) -> list[int]:
    return order.sample_indices(0, np.array(step), np.arange(BATCH), BATCH, 1797).tolist()


POISONED = [samples(step)[0] for step in BAD]
SETTINGS = (
    "data.kind=tests.distributed.stalling",
    f"data.poisoned={POISONED}",
    f"train.global_batch={BATCH}",
    "model.depth=1",
    "log.every=2",
    "checkpoint.every=5",
    "checkpoint.keep=9",
    "train.max_bad_steps=2",
)


@pytest.mark.parametrize(("engine", "world"), [("torch", 1), ("deepspeed", 2)])
def test_the_run_goes_back_and_leaves_the_data_out(launcher, engine, world):
    settings = (*SETTINGS, f"engine={engine}")
    output = launcher.train("run", *settings, "train.steps=10", world=world)
    assert "going back from step 8 to 5" in output
    run = launcher.folder / "run"
    notes = [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]
    assert [each["step"] for each in notes] == list(BAD)
    for step, each in zip(BAD, notes, strict=True):
        assert each["samples"] == samples(step)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert all(line["loss"] is not None for line in lines)
    last = run / "checkpoints" / "step-00000010"
    assert json.loads((last / "manifest.json").read_text())["left_out"] == list(BAD)
    assert all(tensor.isfinite().all() for tensor in load_file(last / "ema.safetensors").values())
    if world > 1:
        return
    launcher.train("run", *settings, "train.steps=12")
    launcher.train("whole", *settings, "train.steps=12")
    one, other = (
        load_file(launcher.folder / name / "checkpoints" / "step-00000012" / "ema.safetensors")
        for name in ("run", "whole")
    )
    assert all((one[key] == other[key]).all() for key in one)


def test_the_order_without_what_is_left_out():
    assert [order.data_step(n, [2, 3, 6]) for n in range(6)] == [0, 1, 4, 5, 7, 8]
    assert order.data_step(3, []) == 3


@pytest.mark.parametrize(("step", "checkpoints"), [(1, [1]), (6, [5, 6])])
def test_a_sample_that_one_process_cannot_read_ends_both_before_its_step(
    launcher, step, checkpoints
):
    """In the first two steps, which are agreed on by themselves, and later, when it is told a step ahead."""
    sample = samples(step)[-1]  # the last slot is the second process's
    assert not any(sample in samples(other) for other in range(step))
    settings = (*SETTINGS[:1], f"data.unreadable=[{sample}]", *SETTINGS[2:], "engine=torch")
    output = launcher.train("run", *settings, "train.steps=9", world=2, expect=2)
    assert output.count(f"error (process 1): sample {sample} cannot be read") == 1, output
    assert "Traceback" not in output and output.count("error") == 1, output
    folders = (launcher.folder / "run" / "checkpoints").glob("step-*")
    assert sorted(int(folder.name[5:]) for folder in folders) == checkpoints
