"""`train.latents=bf16`, as it is typed: the same run but for the rounding of its data, and refused for pixels."""

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, good) -> list:
    folder = tmp_path_factory.mktemp("latents")
    x = np.random.default_rng(2).normal(size=(24, 4, 4, 4)).astype(np.float16)
    np.savez(folder / "x.npz", x=x)
    good("encode", "--arrays", folder / "x.npz", "--out", folder / "set", "--scale", 0.9)
    small = ["model.size=tiny/2", "model.depth=1", "model.hidden_size=16", "model.num_heads=1"]
    words = ["train", "--config", "digits_dit_tiny", "engine=torch", "data.kind=shards", *small]
    words += [f"data.path={folder / 'set'}", "data.check_scale=false", "train.global_batch=8"]
    return [*words, "train.steps=2", "log.every=1", "timesteps=adaptive"]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_on_rounded_latents(words, tmp_path: Path, good) -> None:
    """In memory as well, and by the method that looks at x0 itself."""
    found = {}
    for latents in ("fp32", "bf16"):
        more = [f"train.latents={latents}", f"run_dir={tmp_path / latents}"]
        good(*words, *more, "train.resident=true")
        found[latents] = losses(tmp_path / latents)
    assert len(found["bf16"]) == 2 and found["bf16"] != found["fp32"]
    np.testing.assert_allclose(found["bf16"], found["fp32"], rtol=0.02)


def test_pixels_and_a_resume_that_rounds_are_refused(words, data, tmp_path: Path, good, command):
    run = f"run_dir={tmp_path / 'run'}"
    pixels = [f"data.path={data}" if str(word).startswith("data.path=") else word for word in words]
    answer = command(*pixels, run, "train.latents=bf16")
    assert answer.code == 2 and not (tmp_path / "run").exists()
    assert "train.latents=bf16 is for latents, and the data are pixels" in answer.err
    good(*words, run, "checkpoint.every=1")
    answer = command(*words, run, "train.latents=bf16")
    assert answer.code == 2 and "(config.train.latents: fp32 -> bf16)" in answer.err
