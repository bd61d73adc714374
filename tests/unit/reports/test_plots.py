"""Pictures of a run: what is read from metrics.jsonl, and that the PNGs show it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from speed_engine.reports.plots import describe, plot_run, read_metrics, smooth


def write_run(run, lines) -> None:
    run.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)


def line(step: int, loss: float = 0.5, **more):
    by_t = [loss * (2 - k / 16) for k in range(16)]
    return {
        "step": step,
        "loss": loss,
        "lr": 1e-4,
        "anything": {"else": 1},
        "loss_by_t": by_t,
        **more,
    }


def blue(path) -> np.ndarray:
    """Where the picture has the curve's colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.abs(pixels - [0x1F, 0x5F, 0xA8]).sum(2) < 12


def test_both_pictures_show_their_curve(tmp_path) -> None:
    run = tmp_path / "a run"
    write_run(run, [line(50 * i, 1 / i) for i in range(1, 101)])
    paths = plot_run(run, tmp_path / "new" / "plots")
    assert [p.name for p in paths] == ["loss.png", "loss_by_t.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (1200, 720)
        curve = blue(path)
        assert curve[:, 300:900].any(axis=0).mean() > 0.9  # the curve spans the middle
        left, right = (
            np.argwhere(curve[:, columns])[:, 0].mean()
            for columns in (slice(150, 350), slice(800, 1000))
        )
        assert right > left + 50  # and falls, as the numbers do
    assert not list(tmp_path.rglob("*.partial"))


def test_empty_buckets_are_gaps(tmp_path) -> None:
    lines = [line(i) for i in range(1, 30)]
    for one in lines:
        one["loss_by_t"][7:9] = [None, None]
    write_run(tmp_path, lines)
    whole = tmp_path / "whole"
    write_run(whole, [line(i) for i in range(1, 30)])
    gap = blue(plot_run(tmp_path, tmp_path)[1])
    full = blue(plot_run(whole, whole)[1])
    missing = full.any(axis=0) & ~gap.any(axis=0)
    assert 60 < missing.sum() < 350


@pytest.mark.parametrize(
    "lines",
    [
        [line(10)],
        [line(10), line(20)],
        [line(i, 0.1 + 1e-5 * i) for i in range(1, 9)],
        [line(i, -0.1 + 0.1 * i) for i in range(4)],
        [line(1), line(2, loss_by_t=[1.0, 2.0])],
        [line(1, loss_by_t=[0.0] * 16)],
    ],
    ids=["one line", "two", "flat", "not positive", "bucket count changed", "zero error"],
)
def test_unusual_runs_are_drawn(tmp_path, lines) -> None:
    write_run(tmp_path, lines)
    for path in plot_run(tmp_path, tmp_path):
        assert blue(path).any()


def test_runs_without_buckets_get_one_picture(tmp_path) -> None:
    write_run(tmp_path, [{"step": i, "loss": 1.0} for i in range(3)])
    assert [p.name for p in plot_run(tmp_path, tmp_path)] == ["loss.png"]
    write_run(tmp_path, [line(i, loss_by_t=[None] * 16) for i in range(3)])
    assert [p.name for p in plot_run(tmp_path, tmp_path)] == ["loss.png"]


def test_metrics_are_read_with_care(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(
        tmp_path,
        [
            line(10, 3.0),
            line(20, 2.0),
            "",
            line(30, float("nan")),
            {"event": "resumed"},
            line(20, 2.5),
            '{"step": 40, "lo',
        ],
    )
    assert [(one["step"], one["loss"]) for one in read_metrics(path)] == [(10, 3.0), (20, 2.5)]
    write_run(tmp_path, ["broken", line(1)])
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_metrics(path)
    write_run(tmp_path, [line(1, float("inf"))])
    with pytest.raises(ValueError, match="no line"):
        read_metrics(path)
    with pytest.raises(ValueError, match="is missing"):
        read_metrics(tmp_path / "nothing")


def test_heading_names_the_method(tmp_path) -> None:
    run = tmp_path / "first"
    run.mkdir()
    assert describe(run) == "first"
    sections = {"timesteps": "speed", "schedule": "cosine", "objective": "v"}
    manifest = {"config": {name: {"kind": kind} for name, kind in sections.items()}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert describe(run) == "first, timesteps speed, schedule cosine, objective v"
    for text in ("", "[]", "{}", '{"config": 3}'):
        (run / "manifest.json").write_text(text)
        assert describe(run) == "first"


def test_smoothing_is_a_mean_that_keeps_the_length() -> None:
    values = np.array([1.0, 5.0, 3.0, 7.0, 9.0])
    assert smooth(values, 1).tolist() == values.tolist()
    assert smooth(values, 3).tolist() == [3, 3, 5, pytest.approx(19 / 3), 8]
    np.testing.assert_allclose(smooth(np.full(50, 2.0), 8), 2.0)


def test_import_is_light() -> None:
    code = "import sys, speed_engine.reports.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
