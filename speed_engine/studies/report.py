"""The report folder: report.json holds curves, configurations and findings; report.md and the pictures follow from it.

`compare --report FOLDER` makes everything again from report.json alone.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from speed_engine.atomic_files import write_json, write_text
from speed_engine.studies import commits, pictures
from speed_engine.studies.results import AXES, findings
from speed_engine.studies.runs import StudyError, result_path
from speed_engine.studies.study import TRAINING_METRICS, Cell, Study, check

FORMAT = 1
PACKAGES = ("speed-engine", "torch", "numpy", "deepspeed", "triton")

SNIPPET = """\
import json, statistics
from speed_engine.studies.results import final, needed, spent
from speed_engine.studies.statistics import ratio_interval
report, cells, mean, ratio = json.load(open("report.json")), {}, {}, {}
for cell in report["cells"]:
    cells.setdefault((cell["setting"], cell["method"]), []).append(cell)
for (setting, method), own in cells.items():
    base, target = cells[setting, report["study"]["baseline"]], report["findings"]["settings"][setting]["target"]
    mean[setting, method] = statistics.fmean(map(final, own))
    for axis in ("images", "flops", "seconds"):
        mine, theirs = ([needed(cell, axis, target) for cell in each] for each in (own, base))
        ratio[setting, method, axis] = ratio_interval(mine, theirs, *spent(own, base, axis))
"""

READING = """\
## How to read it

- **Target**: {target}. Lower is better. A run reaches it where the running minimum of its curve does, linear in the
  log of the metric over the log of the axis between two points ({cadence} steps apart).
- **Ratio**: what the method needed over what {baseline} needed, paired over seeds, on logs; below 1 is cheaper. In
  brackets the 95 % interval: Student's t over pairs where all runs arrived. A run that does not arrive needs more than
  it spent, we do not know how much: it stays in the interval as censored (normal logs of equal spread in both methods,
  Gibbs sampling; `speed_engine/studies/statistics.py`). With fewer than two pairs of which both arrived the interval is
  (0, inf). A run that diverges counts as one that never arrives, as long as the longest run.
- **inconclusive**: 1 lies inside the interval; the gap is inside the noise of {n} seeds. Every interval stands alone:
  of twenty methods that change nothing, one will look different.
- **twins**: correlation over seeds of the logs of what the two methods needed (in brackets: of their final values).
  Seeds are shared: same initial weights, order, noise and uniform numbers behind t. Near 0 pairing has gained nothing.
- **FLOPs** are those of forward and backward passes; what a method computes beside them (`adaptive`) shows in seconds
  alone. **Seconds** are of training, on whatever else the machine was doing: cells ran side by side.
{caution}"""


def gather(study: Study, cells: Sequence[Cell], folder: Path) -> dict[str, Any]:
    """What report.json stores, from the results of all cells. Raises StudyError where one is missing."""
    missing = [cell.name for cell in cells if not result_path(folder, cell).exists()]
    if missing:
        raise StudyError(
            f"{len(missing)} cells of {folder} have not ended ({missing[0]}); the same command without "
            "--report continues"
        )
    results = [json.loads(result_path(folder, cell).read_text(encoding="utf-8")) for cell in cells]
    return {
        "format": FORMAT,
        "study": study.model_dump(mode="json"),
        "commit": commits.current(),
        "versions": _versions(),
        "cells": results,
    }


def write(stored: dict[str, Any], out: Path) -> list[Path]:
    """report.json, report.md and the pictures into `out`, from what report.json stores; the files written."""
    study = check(stored["study"])
    found = findings(study, stored["cells"])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", {**stored, "findings": found})
    drawn = pictures.draw(study, stored["cells"], found, out)
    write_text(out / "report.md", as_markdown(study, stored, found, drawn))
    return [out / "report.md", out / "report.json", *drawn]


def read(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(report folder, what its report.json stores). Raises StudyError where there is none, or of another version."""
    out = folder if (folder / "report.json").exists() else folder / "report"
    path = out / "report.json"
    if not path.exists():
        raise StudyError(f"{folder} holds no report.json; give the folder that compare wrote")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    parts = {"study", "cells", "commit", "versions"}
    if not isinstance(stored, dict) or stored.get("format") != FORMAT or not parts <= set(stored):
        raise StudyError(f"{path} is no report of this version; run compare")
    return out, stored


def as_markdown(
    study: Study, stored: dict[str, Any], found: dict[str, Any], drawn: Sequence[Path]
) -> str:
    """The page."""
    cells = stored["cells"]
    devices = sorted({f"{cell['device']}, {cell['threads']} threads" for cell in cells})
    target = (
        f"the median over seeds of {study.reference}'s own final {study.metric}"
        if study.target == "baseline"
        else f"{study.metric} = {study.target:g}"
    )
    caution = ""
    if study.metric in TRAINING_METRICS:
        caution = (
            f"- **Caution**: {study.metric} is a training loss over the time steps that a method itself draws, so it "
            "compares methods of different densities or weights unfairly.\n"
        )
    lines = [f"# Study {study.name}", ""]
    if study.about:
        lines += [study.about, ""]
    lines += [
        f"{len(study.methods)} methods, {len(study.seeds)} seeds, {len(study.settings)} settings, "
        f"{study.steps} steps a cell from `{study.preset}`; {'; '.join(devices)}; "
        f"{commits.told(cell.get('commit', stored['commit']) for cell in cells)}.",
        "",
    ]
    for setting, one in found["settings"].items():
        lines += _table(study, setting, one)
        pictures_of = [path.name for path in drawn if path.name.startswith(f"{setting}_")]
        lines += [f"![{name}]({name})" for name in pictures_of] + [""]
    lines += _pairing(study, found) + _profile(found["profile"])
    fields = {
        "target": target, "cadence": study.cadence, "baseline": study.reference,
        "n": len(study.seeds), "caution": caution,
    }  # fmt: skip
    lines += [READING.format(**fields), "## Recompute every number", ""]
    lines += ["`python -m speed_engine compare --report FOLDER`, or, beside report.json:", ""]
    return "\n".join([*lines, "```python", SNIPPET.rstrip(), "```", ""])


# ------------------------------------------------------------------------------------------------ its parts


def _table(study: Study, setting: str, found: dict[str, Any]) -> list[str]:
    target = "none" if found["target"] is None else f"{found['target']:.5g}"
    head = ["method", f"final {study.metric}", "ratio of final", "reached"]
    head += [f"{axis} to target" for axis in AXES] + ["twins", "by images"]
    lines = [f"## {setting}: target {target}", "", _row(head), _row(["---"] * len(head))]
    for name, one in found["methods"].items():
        final = "diverged" if one["final_mean"] is None else f"{one['final_mean']:.5g}"
        if one["final_std"] is not None:
            final += f" ± {one['final_std']:.1g}"
        cells = [name, final, _interval(one["final_ratio"])]
        cells.append(f"{one['reached']} of {len(study.seeds)}")
        cells += [_interval(one[axis]["ratio"]) for axis in AXES]
        cells.append(f"{_number(one['images']['twins'])} ({_number(one['final_twins'])})")
        cells.append(one["images"]["ratio"]["verdict"])
        if name == study.reference:
            cells[2], cells[4:] = "1", ["1"] * len(AXES) + ["-", "baseline"]
        lines.append(_row(cells))
    return [*lines, ""]


def _pairing(study: Study, found: dict[str, Any]) -> list[str]:
    """How much the shared seeds have gained."""
    head = ["setting", "method", "twins", "strangers", "pairs saved"]
    lines = ["## Twins against strangers", ""]
    lines += [
        "Standard deviation over seeds of the log ratio of final values, of twins and as if seeds were independent; "
        "the last column is the share of seeds that pairing saves at equal width of the interval.",
        "",
        _row(head),
        _row(["---"] * len(head)),
    ]
    for setting, one in found["settings"].items():
        for name, own in one["methods"].items():
            twins, strangers = own["spread_twins"], own["spread_strangers"]
            if name == study.reference or not twins or not strangers:
                continue
            saved = f"{100 * (1 - (twins / strangers) ** 2):.0f} %"
            lines.append(_row([setting, name, f"{twins:.4f}", f"{strangers:.4f}", saved]))
    return [*lines, ""]


def _profile(profile: dict[str, Any]) -> list[str]:
    scores = sorted(profile["scores"].items(), key=lambda item: -item[1])
    return [
        "## Performance profile",
        "",
        "Share of (setting, seed) on which a method needs at most r times the images of the best one; the score is "
        f"the area for r from 1 to {profile['ratios'][-1]:g} (AlgoPerf). A target that is missed never counts.",
        "",
        _row(["method", "score"]),
        _row(["---", "---"]),
        *(_row([name, f"{score:.3f}"]) for name, score in scores),
        "",
        "![profile.png](profile.png)",
        "",
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(one: dict[str, Any]) -> str:
    if one["ratio"] is None:
        return f"(0, inf), {one['arrived']} of {one['pairs']} pairs"
    high = math.inf if one["high"] is None else one["high"]
    return f"{one['ratio']:.3g} ({one['low']:.3g}, {high:.3g})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
