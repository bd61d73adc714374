"""Drawn glyphs: addressed pictures of letters, their set, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from speed_engine.data import DataError, glyph_pictures, glyphs

pytest.importorskip("matplotlib")
ATLAS = "daac22ba84d49cb7c70e61d3299ad66a6dcf57697dcd3b20415c277ef7493a7f"
PIXELS = "b61d1e594bd26f8acf59e89b6550e12dc0abd412f3c6fb16d283ed3e4c6c09de"


def test_a_picture_depends_on_seed_and_number_alone() -> None:
    """Alone or among others, with any number of threads; another seed is another picture of the same character."""
    whole, labels = glyph_pictures.draw(7, 100, 40)
    assert whole.shape == (40, 3, 32, 32) and whole.dtype == np.uint8
    assert labels.tolist() == [i % 62 for i in range(100, 140)]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    part, _ = glyph_pictures.draw(7, 117, 5)
    torch.set_num_threads(threads)
    assert (part == whole[17:22]).all()
    other, same = glyph_pictures.draw(8, 100, 40)
    assert (same == labels).all() and (other != whole).any((1, 2, 3)).all()


def test_these_bytes_are_for_ever() -> None:
    """Sets made by others hold the same pictures: a change of the recipe would go unnoticed otherwise."""
    import hashlib

    pixels, _ = glyph_pictures.draw(0, 0, 62)
    if glyph_pictures.atlas().sha256 != ATLAS:
        pytest.skip("matplotlib's fonts are others here")
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == PIXELS


def test_outlines_are_filled_and_holes_are_not() -> None:
    """A square of 10 with a square hole of 4, the hole running the other way; a slanted edge in its share."""
    outer = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    inner = np.array([[3.0, 3], [3, 7], [7, 7], [7, 3]])
    points = np.concatenate([outer, outer[:1], inner, inner[:1]])
    codes = np.array([1, 2, 2, 2, 79, 1, 2, 2, 2, 79])
    share = glyph_pictures.covered(glyph_pictures.edges(points, codes)).reshape(40, 40)
    assert share.sum() == pytest.approx(100 - 16)
    triangle = np.array([[0.0, 0], [10, 0], [0, 10], [0, 0]])
    share = glyph_pictures.covered(glyph_pictures.edges(triangle, np.array([1, 2, 2, 79])))
    assert share.sum() == pytest.approx(50, rel=0.01)


def test_curves_end_where_they_should() -> None:
    """A circle of four cubic arcs: its area, by straight pieces a little less."""
    k, arc = 0.5522847498, []
    for x, y in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        arc += [(x - k * y, y + k * x), (-y + k * x, x + k * y), (-y, x)]
    points = 8 * np.array([(1.0, 0.0), *arc, (1.0, 0.0)])
    outline = glyph_pictures.edges(points, np.array([1, *[4] * 12, 79]))
    assert len(outline) == 16
    assert glyph_pictures.covered(outline).sum() == pytest.approx(np.pi * 64, rel=0.03)


def test_every_character_is_seen() -> None:
    ink = glyph_pictures.atlas().ink_FCP
    assert ink.shape == (12, 62, 1600) and ink.max() == 1
    assert (ink.sum(2) > 15).all()
    flat = ink[0]
    assert len(np.unique(flat, axis=0)) == 62


def test_the_set(tmp_path: Path) -> None:
    config = glyphs.Config(path=str(tmp_path / "set"), count=130, seed=3)
    source = glyphs.build(config)
    assert len(source) == 130 and source.facts.shape == (3, 32, 32)
    assert glyphs.build(config).fingerprint == source.fingerprint
    assert json.loads((tmp_path / "set" / "index.json").read_text())["class_names"][10] == "A"
    for wrong, words in (({"seed": 4}, "of seed 3, not 4"), ({"count": 131}, "of count 130, not")):
        with pytest.raises(DataError, match=f"holds glyphs {words}"):
            glyphs.build(config.model_copy(update=wrong))
    (tmp_path / "set" / "encode.json").write_text('{"images": "digits"}')
    with pytest.raises(DataError, match="something else than the glyphs"):
        glyphs.build(config)


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (2**32 - 1, 2)])
def test_numbers_that_no_picture_has(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="numbered 0 to"):
        glyph_pictures.draw(0, first, count)
