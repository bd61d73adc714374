"""The glyphs' judge: fresh draws are as good as fresh draws, training draws are copies, and noise is neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speed_engine.data import glyph_pictures
from speed_engine.reports.scores import glyphs, judge_of, score

pytest.importorskip("matplotlib")
NUM = 310


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fewer draws on both sides than a true score has."""
    monkeypatch.setattr(glyphs, "NUM_REAL", 1240)
    monkeypatch.setattr(glyphs, "NUM_NEAREST", NUM)
    monkeypatch.setattr(glyphs, "COUNT", 1000)
    for cached in (glyphs._real, glyphs._space):
        cached.cache_clear()
    yield
    for cached in (glyphs._real, glyphs._space):
        cached.cache_clear()


def drawn(first: int) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = glyph_pictures.draw(0, first, NUM)
    return pixels.transpose(0, 2, 3, 1), labels


def test_fresh_draws_are_what_they_should_be() -> None:
    report = glyphs.score_glyphs(*drawn(glyph_pictures.FRESH + 10**6 * 62))
    assert report["class_agreement"]["agreement"] > 0.9
    assert report["classifier"]["held_out_accuracy"] > 0.93
    frechet, copies = report["frechet"], report["memorisation"]
    assert abs(frechet["excess"]) < 3 * frechet["floor"]["std"] < 1.5
    assert copies["ratio"] == pytest.approx(1, abs=0.05) and copies["copies"] < 0.04
    assert set(report["class_agreement"]["by_class"]) == set(glyph_pictures.CHARACTERS)


def test_training_draws_are_copies() -> None:
    report = glyphs.memorisation(drawn(62)[0])
    assert report["ratio"] < 1e-3 and report["copies"] == 1


def test_noise_and_one_colour_are_far_away() -> None:
    pixels, labels = drawn(glyph_pictures.FRESH + 62 * 10**6)
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    grey = np.broadcast_to(pixels.mean((1, 2), keepdims=True), pixels.shape).astype(np.uint8)
    single = np.repeat(pixels[:, :, :, :1], 3, 3)  # without colour
    judge = judge_of("glyphs")
    assert judge is not None and judge_of("shards") is None
    own = judge(pixels, labels)
    for other in (noise, grey):
        found = judge(other, labels)
        assert found["class_agreement"] < 0.1
        assert found["frechet_distance"] > 5 * own["frechet_distance"]
    assert judge(single, labels)["frechet_distance"] > 1.5 * own["frechet_distance"]


def test_score_through_files(tmp_path: Path) -> None:
    pixels, labels = drawn(glyph_pictures.FRESH + 62 * 10**6)
    np.savez(tmp_path / "mine.npz", arr_0=pixels, labels=labels)
    report = score(tmp_path / "mine.npz", "glyphs", tmp_path / "score.json")
    assert report["measured"]["space"]["network"] == report["classifier"]["sha256"]
    assert report["neighbours"]["precision"] > 0.6
    assert json.loads((tmp_path / "score.json").read_text())["kind"] == "glyphs"


@pytest.mark.parametrize(
    ("shape", "label", "words"),
    [((4, 8, 8, 1), 0, "32 x 32 x 3 pixels"), ((4, 32, 32, 3), 62, "labels of glyphs are 0 to 61")],
)
def test_what_is_no_glyph_is_refused(shape: tuple[int, ...], label: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        glyphs.score_glyphs(np.zeros(shape, np.uint8), np.full(4, label))
