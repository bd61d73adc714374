"""Every network but the DiT in real processes: engines, stages, micro-batches and a resume draw and learn the same.

What a network draws by address is on: an MDT's masks, a U-Net's dropout with augmented pictures, which caption of
three; what it learns from two processes must be what one process learns.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from speed_engine.conditions.text import described
from speed_engine.data.storage.index import StoredCondition
from speed_engine.data.storage.writer import SetWriter

SETTINGS = {
    "train.steps": 4,
    "train.global_batch": 16,
    "train.flip": "false",
    "optim.warmup_steps": 10,
    "checkpoint.every": 1,
    "checkpoint.keep": 4,
    "log.every": 2,
}
NETWORKS = {
    # EDM's for CIFAR-10, smaller
    "unet": (
        "model={kind: unet, size: ddpmpp, width: 16, multipliers: [1, 2], num_blocks: 1, dropout: 0.2}",
        "model.attention_at=[4]",
        "schedule={kind: edm, num_cells: 512}",
        "objective=edm",
        "learned_variance=false",
        "timesteps={kind: edm}",
        "conditions={label: {}, augment: {probability: 0.5}}",
    ),
    "mdt": ("model={kind: mdt, size: tiny/2, hidden_size: 48, depth: 3, num_heads: 2}",),
    "dit_text": (
        "model={kind: dit_text, size: tiny/2, hidden_size: 48, depth: 2, num_heads: 2, cross_attention: true}",
    ),
}
WEIGHTS = ("model", "ema")


def write_captioned(folder: Path) -> None:
    """32 pictures of noise with three captions each, which are noise as well."""
    random = np.random.default_rng(5)
    captions, length, width = 3, 4, 8

    def noise(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype("f2")

    empty = {"text": noise(width), "text_tokens": noise(length, width)}
    facts = described("noise", captions, empty, 8)
    condition = StoredCondition(kind="text", arrays=[*facts.arrays], details=dict(facts.details))
    with SetWriter(folder, {"made": "test"}, shard_size=16) as writer:
        for number in range(32):
            told = {
                "text": noise(captions, width),
                "text_tokens": noise(captions, length, width),
                "text_count": np.array(captions, "i4"),
                "text_utf8": np.full(8, ord("x"), "u1"),
            }
            pixels = random.integers(0, 256, (1, 8, 8)).astype("u1")
            writer.write(number + 1, pixels, None, arrays=told)
        writer.finish(conditions={"text": condition})


@pytest.fixture(scope="module")
def train(launcher_in, tmp_path_factory: pytest.TempPathFactory):
    """train(network, name, world, overrides) -> the run and its weights after the last step; one folder for all."""
    launcher = launcher_in(tmp_path_factory.mktemp("networks"))
    write_captioned(launcher.folder / "captioned")
    zero3 = launcher.folder / "zero3.json"  # which cuts the smallest weight, too
    zero3.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))

    def weights(network: str, name: str, world: int, *overrides: str):
        run = launcher.folder / f"{network} {name}"
        data = launcher.folder / "captioned" if network == "dit_text" else launcher.data
        preset = "own_pixels" if network == "dit_text" else "digits_dit_tiny"
        words = {"run_dir": run, "data.path": data, **SETTINGS}
        words |= dict(word.split("=", 1) for word in (*NETWORKS[network], *overrides))
        if words.get("engine.zero") == "3":
            words["engine.json_file"] = zero3
        arguments = [f"{key}={value}" for key, value in words.items()]
        launcher.wait(launcher.start(world, [f"--config={preset}", *arguments]))
        folder = run / "checkpoints" / f"step-{int(words['train.steps']):08d}"
        files = {which: load_file(folder / f"{which}.safetensors") for which in WEIGHTS}
        return run, {
            f"{which} {key}": value for which in WEIGHTS for key, value in files[which].items()
        }

    return weights


@pytest.fixture(scope="module")
def alone(train):
    """alone(network) -> its run in one process."""
    runs: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def of(network: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if network not in runs:
            runs[network] = train(network, "alone", 1, "engine=torch")
        return runs[network]

    return of


def assert_the_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("network", "world", "overrides"),
    [
        ("unet", 1, ("engine=torch", "train.micro_batch=4")),
        ("unet", 2, ("engine=torch",)),
        ("unet", 2, ("engine.zero=1", "train.micro_batch=4")),
        ("mdt", 2, ("engine.zero=1",)),
        ("dit_text", 2, ("engine.zero=1",)),
    ],
    ids=["unet-micro-batches", "unet-ddp", "unet-zero1", "mdt-zero1", "dit_text-zero1"],
)
def test_any_split_of_a_batch_learns_the_same(
    train, alone, request, network, world, overrides
) -> None:
    _, found = train(network, request.node.callspec.id, world, *overrides)
    assert_the_same(found, alone(network)[1])


@pytest.mark.parametrize("network", NETWORKS)
def test_zero_three_learns_the_same_and_another_engine_goes_on(train, alone, network) -> None:
    """Three steps with every weight in two halves, then one step of one process that has them whole."""
    run, found = train(network, "zero3", 2, "engine.zero=3", "train.steps=3")
    before = alone(network)[0] / "checkpoints" / "step-00000003"
    expected = {
        f"{which} {key}": value
        for which in WEIGHTS
        for key, value in load_file(before / f"{which}.safetensors").items()
    }
    assert_the_same(found, expected)
    _, found = train(network, "zero3", 1, "engine=torch", "checkpoint.resume=must")
    assert_the_same(found, alone(network)[1])
    assert len(list((run / "checkpoints").glob("step-*"))) == 4


@pytest.mark.parametrize(
    ("network", "setting"),
    [
        ("unet", "model.dropout=0"),
        ("mdt", "model.mask_ratio=0.9"),
        ("dit_text", "conditions.text.dropout=0.9"),
    ],
)
def test_what_is_drawn_shows_in_the_weights(train, alone, network, setting) -> None:
    """Beyond the tolerance of the tests above, that is: they would see another draw."""
    _, other = train(network, "other", 1, "engine=torch", setting)
    _, expected = alone(network)
    apart = max((other[name] - expected[name]).abs().max().item() for name in expected)
    assert apart > 10 * 2e-5


def test_a_resume_repeats_what_was_dropped(train, alone) -> None:
    run, expected = alone("unet")
    again = run.with_name("unet again")
    shutil.copytree(run, again)
    for later in (3, 4):
        shutil.rmtree(again / "checkpoints" / f"step-{later:08d}")
    _, resumed = train("unet", "again", 1, "engine=torch", "checkpoint.resume=must")
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
