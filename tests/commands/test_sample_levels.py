"""The levels that `sample` visits, as its recipe records them: those of the schedule, whatever training drew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

TINY = ["model.size=tiny/2", "model.depth=1", "model.hidden_size=16", "model.num_heads=1"]
TINY += ["engine=torch", "train.steps=1", "train.global_batch=8", "learned_variance=false"]
FLOW = ["schedule=rectified_flow", "objective=flow"]
EDM = ["schedule=edm", "objective=edm"]


@pytest.fixture(scope="module")
def trained(data: Path, good, tmp_path_factory: pytest.TempPathFactory):
    """trained(name, words) -> the folder of a run of one step."""
    folder = tmp_path_factory.mktemp("one_step")

    def run(name: str, words: list[str]) -> Path:
        place = folder / name
        if not place.exists():
            settings = [*TINY, *words, f"data.path={data}", f"run_dir={place}"]
            good("train", "--config", "digits_dit_tiny", *settings)
        return place

    return run


def log_snr_of_flow(t: np.ndarray) -> list[float | None]:
    """2 ln((1 - t) / t), from clean to noisy; null at t = 1."""
    return [None if each == 1 else round(2 * float(np.log((1 - each) / each)), 6) for each in t]


def draw(good, run: Path, out: Path, *words: object) -> list[object]:
    good("sample", "--run", run, "--out", out, "--num", 2, "--device", "cpu", *words)
    assert len(list((out / "images").iterdir())) == 2

    return json.loads((out / "recipe.json").read_text())["log_snr"]


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal", "laplace"])
def test_rectified_flow(timesteps: str, trained, good, tmp_path: Path) -> None:
    run = trained(f"flow_{timesteps}", [*FLOW, f"timesteps={timesteps}"])
    found = draw(good, run, tmp_path / "a", "--sampler", "ddim", "--steps", 10)
    t = np.arange(1, 11) / 10
    assert found == pytest.approx(log_snr_of_flow(t), abs=2e-6)
    if timesteps == "logit_normal":
        words = ["--sampler", "dpm++", "--steps", 10, "--shift", 3]
        shifted = draw(good, run, tmp_path / "b", *words)
        assert shifted == pytest.approx(log_snr_of_flow(3 * t / (1 + 2 * t)), abs=2e-6)


@pytest.mark.parametrize("timesteps", ["uniform", "edm", "log_normal"])
def test_edm(timesteps: str, trained, good, tmp_path: Path) -> None:
    run = trained(f"edm_{timesteps}", [*EDM, f"timesteps={timesteps}"])
    found = draw(good, run, tmp_path / "a", "--sampler", "heun", "--steps", 18)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = (high + np.arange(17, -1, -1) / 17 * (low - high)) ** 7
    assert found == pytest.approx(list(-2 * np.log(sigma)), abs=2e-6)


@pytest.mark.parametrize("sampler", ["dpm++", "heun"])
def test_zero_terminal_snr_takes_every_step_there_is(
    sampler: str, trained, good, tmp_path: Path
) -> None:
    """The last rows are 0 or nearly so, and a solver divides by the difference of their log-SNR."""
    zero = ["schedule.zero_terminal_snr=true", "objective=v", "timesteps=uniform"]
    run = trained("zero_snr", zero)
    found = draw(good, run, tmp_path / "a", "--sampler", sampler, "--steps", 1000)
    assert len(found) == 1000 and found[-1] is None and None not in found[:-1]


def test_a_sampler_from_outside(trained, good, command, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own_lab").mkdir()
    (tmp_path / "own_lab" / "mine.py").write_text(
        "from speed_engine.sampling.ddim import LARGEST_MAGNIFICATION, SPACING, Config, build\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = trained("flow_uniform", [*FLOW, "timesteps=uniform"])
    pictures = []
    for word in ("ddim", "own_lab.mine"):
        draw(good, run, tmp_path / word, "--sampler", word, "--steps", 4)
        pictures.append(np.load(tmp_path / word / "samples.npz")["arr_0"])
    assert np.array_equal(*pictures)
    answer = command(
        "sample", "--run", run, "--out", tmp_path / "no", "--sampler", "own_lab.yours", "--steps", 4
    )
    assert answer.code == 2 and "own_lab.yours" in answer.err and not (tmp_path / "no").exists()
