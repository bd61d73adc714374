"""Several runs in one picture, other formats, classes by name; what is drawn is looked up in the pictures."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from speed_engine.reports import plots_classes, style
from speed_engine.reports.plots import plot_run
from speed_engine.reports.plots_runs import labels_of, names_of, plot_runs


def write_run(run, lines, method=None) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if method:
        kinds = {"timesteps": method, "schedule": "linear", "objective": "epsilon"}
        config = {key: {"kind": kind} for key, kind in kinds.items()}
        (run / "manifest.json").write_text(json.dumps({"config": config}))


def lines(factor=1.0, judged=True):
    more = {"validation_loss": factor * 0.1, "validation_loss_se": 0.001} if judged else {}
    return [
        {"step": i, "loss": factor / i, "loss_by_t": [factor / i * (2 - k / 16) for k in range(16)]}
        | more
        for i in range(1, 40)
    ]


def has(path, colour: str) -> int:
    """Pixels of a colour in a PNG."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).sum(2) < 12).sum())


def test_a_line_a_run(tmp_path) -> None:
    for name, factor, judged in (("a", 1.0, True), ("b", 2.0, True), ("c", 4.0, False)):
        write_run(tmp_path / name, lines(factor, judged), f"method_{name}")
    runs = [tmp_path / name for name in "abc"]
    paths = plot_runs(runs, tmp_path / "out" / "new")
    assert [path.name for path in paths] == ["loss.png", "loss_by_t.png", "validation.png"]
    for path in paths[:2]:
        assert all(has(path, colour) > 150 for colour in style.LINES[:3]), path
        assert not has(path, style.LINES[3])
    assert has(paths[2], style.LINES[1]) > 150 and not has(paths[2], style.LINES[2])
    write_run(tmp_path / "d", [{"step": 1, "loss": 0.5}])
    assert [p.name for p in plot_runs([tmp_path / "d"] * 1, tmp_path / "e")] == ["loss.png"]


def test_a_line_that_lies_on_another_shows_both(tmp_path) -> None:
    for name in "ab":
        write_run(tmp_path / name, lines())
    path = plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path)[0]
    assert min(has(path, colour) for colour in style.LINES[:2]) > 300


def test_runs_are_named_by_what_tells_them_apart(tmp_path) -> None:
    for place, method in (("x/run", "speed"), ("y/run", "uniform"), ("y/uniform", "uniform")):
        write_run(tmp_path / place, lines(), method)
    x, y, third = tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "uniform"
    assert names_of([x, third]) == ["run", "uniform"]
    assert labels_of([x, y]) == ["x/run (speed)", "y/run (uniform)"]
    assert labels_of([y, third]) == ["run", "uniform"]  # nothing differs but the name
    assert labels_of([x, third]) == ["run (speed)", "uniform"]
    with pytest.raises(ValueError, match="is given twice"):
        names_of([x, x / ".." / "run"])


def test_lines_differ_in_grey_too() -> None:
    looks = [style.line(index, 20) for index in range(20)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 20
    for first, second in itertools.pairwise(looks):
        assert (
            first["linestyle"] != second["linestyle"] and first["linewidth"] > second["linewidth"]
        )


def test_curves_that_lie_on_each_other_are_found() -> None:
    x = np.linspace(0, 1, 50)
    curves = {"a": x, "b": x + 1, "c": x * 1.001, "d": x + 1, "e": x[:20]}
    assert style.alike(curves) == [["a", "c"], ["b", "d"]]
    assert style.alike({"a": x, "b": 1.1 * x}) == []


@pytest.mark.parametrize(("ending", "start"), [("pdf", b"%PDF-"), ("svg", b"<?xml")])
def test_other_formats_keep_letters_and_have_no_date(tmp_path, ending, start) -> None:
    write_run(tmp_path, lines())
    first = {path.name: path.read_bytes() for path in plot_run(tmp_path, tmp_path / "a", ending)}
    again = {path.name: path.read_bytes() for path in plot_run(tmp_path, tmp_path / "b", ending)}
    assert first == again and set(first) == {
        f"loss.{ending}", f"loss_by_t.{ending}", f"validation.{ending}",
    }  # fmt: skip
    content = first[f"loss.{ending}"]
    assert content.startswith(start)
    if ending == "svg":
        assert b"Training loss" in content
    else:  # TrueType, which publishers take
        assert b"/CIDFontType2" in content and b"/Type3" not in content


def test_classes_have_names_and_bars(tmp_path) -> None:
    table = {"0": {"agreement": 1.0, "samples": 20}, "10": {"agreement": 0.25, "samples": 20}}
    path = tmp_path / "score.json"
    assert plots_classes.agreement_of(path) == {}
    path.write_text(json.dumps({"class_agreement": {"by_class": table}}))
    found = plots_classes.agreement_of(path)
    assert found == {0: (1.0, 20), 10: (0.25, 20)}
    names = ["an owl"] + [str(i) for i in range(1, 11)]
    drawn = plots_classes.plot_agreement(found, names, "a run", tmp_path / "classes.svg")
    text = drawn.read_text()
    assert "an owl (0)" in text and ">10<" in text
    many = {c: (c / 100, 5) for c in range(100)}
    text = plots_classes.plot_agreement(many, (), "a run", tmp_path / "many.svg").read_text()
    assert "worst 60 of 100" in text and ">59<" in text and ">60<" not in text
    for content in ("{", "[]", '{"class_agreement": {"by_class": {"a": 1}}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="score the samples again"):
            plots_classes.agreement_of(path)


def test_the_interval_of_a_share_is_wilsons() -> None:
    low, high = plots_classes.wilson(np.array([0.0, 0.5, 1.0]), np.array([10, 10, 10]))
    np.testing.assert_allclose(low, [0, 0.2366, 0.7225], atol=1e-4)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1], atol=1e-4)
