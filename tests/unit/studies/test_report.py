"""The report of a made-up study whose right answers are known, its pictures, and what a reader recomputes from it."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from speed_engine.__main__ import main
from speed_engine.studies import report
from speed_engine.studies.results import findings
from speed_engine.studies.runs import StudyError
from speed_engine.studies.study import check

SEEDS, STEPS = [0, 1, 2, 3, 4], 400
# Needs of the uniform run's steps; luck is shared by twins.
SPEED = {"uniform": 1.0, "twice": 0.5, "same": 1.0, "slow": 3.0, "burst": 1.0}


def cell(setting: str, method: str, seed: int) -> dict:
    """The metric falls like (steps)^-1/2 at the method's pace and the seed's luck."""
    rng = np.random.default_rng([seed, 5])
    luck = math.exp(0.1 * rng.standard_normal())
    own = math.exp([0.010, -0.012, 0.004, -0.006, 0.003][(seed + list(SPEED).index(method)) % 5])
    steps = list(range(20, STEPS + 1, 20))
    values = [(step / SPEED[method] / luck / own) ** -0.5 for step in steps]
    diverged = method == "burst" and seed == 1
    if diverged:
        steps, values = steps[:3], [*values[:2], None]
    curve = {
        "steps": steps,
        "images": [32 * step for step in steps],
        "flops": [1e9 * step for step in steps],
        "seconds": [(0.02 if method == "twice" else 0.01) * step for step in steps],
        "values": values,
    }
    status = "diverged" if diverged else "finished"
    facts = {"device": "a CPU", "threads": 1, "config": {}, "data": "digits"}
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "status": status,
        "curve": curve,
        **facts,
    }


@pytest.fixture(scope="module")
def stored() -> dict:
    tree = {
        "name": "made_up", "preset": "digits_dit_tiny", "baseline": "uniform",
        "methods": {name: {} for name in SPEED}, "settings": {"plain": {}}, "seeds": SEEDS,
        "steps": STEPS, "cadence": 20,
    }  # fmt: skip
    cells = [cell("plain", method, seed) for seed in SEEDS for method in SPEED]
    study = check(tree).model_dump(mode="json")
    return {"format": 1, "study": study, "commit": "c0ffee", "versions": {}, "cells": cells}


@pytest.fixture(scope="module")
def folder(stored, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    report.write(stored, out)
    return out


def test_the_findings_are_the_known_ones(stored):
    found = findings(check(stored["study"]), stored["cells"])["settings"]["plain"]
    twice, same, slow, burst = (found["methods"][n] for n in ("twice", "same", "slow", "burst"))
    images = twice["images"]["ratio"]
    assert images["low"] < 0.5 < images["high"] and images["high"] - images["low"] < 0.1
    assert images["verdict"] == "faster" and twice["images"]["twins"] > 0.9
    assert twice["seconds"]["ratio"]["low"] < 1 < twice["seconds"]["ratio"]["high"]
    assert (
        twice["seconds"]["ratio"]["verdict"] == "inconclusive"
    )  # half the steps, each twice as long
    assert same["images"]["ratio"]["verdict"] == "inconclusive"
    uniform = found["methods"]["uniform"]
    assert uniform["reached"] == 3  # the target is its own median
    assert sorted(uniform["final"])[2] == found["target"]
    assert (slow["reached"], slow["images"]["ratio"]["high"]) == (0, None)  # infinity
    assert slow["final_ratio"]["verdict"] == "higher"
    assert (burst["diverged"], burst["final_mean"]) == (1, None)
    assert burst["images"]["needed"][1] is None and burst["images"]["ratio"]["pairs"] == 5
    assert twice["spread_twins"] < 0.3 * twice["spread_strangers"]


def test_the_page_says_it_in_words(folder):
    page = (folder / "report.md").read_text()
    table = page.split("## Twins against strangers")[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if "| " in line}
    assert rows["twice"].endswith("| faster |") and rows["same"].endswith("| inconclusive |")
    assert "(0, inf), 0 of 5 pairs" in rows["slow"] and "0 of 5" in rows["slow"]
    assert "diverged" in rows["burst"] and rows["uniform"].endswith("| baseline |")
    for words in ("running minimum", "linear in the", "censored", "c0ffee", "made_up"):
        assert words in page
    for path in folder.glob("*.png"):
        assert f"({path.name})" in page


def test_everything_follows_from_the_json_alone(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "report").mkdir()
    again = tmp_path / "report" / "report.json"
    again.write_bytes((folder / "report.json").read_bytes())
    monkeypatch.setattr(sys, "argv", ["speed_engine", "compare", "--report", str(tmp_path)])
    assert main() == 0
    assert "report.md" in capsys.readouterr().out
    for name in ("report.md", "report.json"):
        assert (tmp_path / "report" / name).read_bytes() == (folder / name).read_bytes()
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        p.name for p in folder.iterdir()
    }


def test_ten_lines_recompute_every_number(folder):
    """The snippet of the page, run beside report.json as a reader would."""
    page = (folder / "report.md").read_text()
    snippet = page.split("```python\n")[1].split("```")[0]
    assert len(snippet.splitlines()) <= 13
    show = "print(json.dumps([[list(k), v.low, v.ratio, v.high, mean[k[:2]]] for k, v in ratio.items()]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{snippet}\n{show}"], cwd=folder, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "report.json").read_text())["findings"]["settings"]["plain"]
    rows = json.loads(done.stdout)
    assert len(rows) == 3 * len(SPEED)
    for (_, method, axis), low, ratio, high, mean in rows:
        one = found["methods"][method]
        assert mean == (math.inf if one["final_mean"] is None else one["final_mean"])
        if method != "uniform" and one[axis]["ratio"]["ratio"] is not None:
            stored = [one[axis]["ratio"][key] for key in ("low", "ratio", "high")]
            assert stored == [low, ratio, high]


def test_the_pictures_show_something(folder):
    from PIL import Image

    names = {f"plain_{what}.png" for what in ("images", "flops", "seconds", "ratios")}
    assert {path.name for path in folder.glob("*.png")} == {*names, "profile.png"}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors(256) or []) > 8


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(StudyError, match=r"holds no report\.json; give the folder"):
        report.read(tmp_path)
    (tmp_path / "report.json").write_text('{"format": 9}')
    with pytest.raises(StudyError, match="is no report of this version"):
        report.read(tmp_path)


def test_a_study_over_two_commits_says_how_many_cells_each_trained(stored):
    first, *others = stored["cells"]
    older = {**stored, "cells": [{**first, "commit": "0ld"}, *others]}
    study = check(stored["study"])
    page = report.as_markdown(study, older, report.findings(study, older["cells"]), [])
    assert f"commits c0ffee ({len(others)} cells), 0ld (1 cells)." in page
