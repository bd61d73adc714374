"""The pictures of a study: curves (one panel a method, the baseline behind it), ratios with intervals, the profile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from speed_engine.reports.style import BLUE, GREY, GRID, LINES, STYLE, save
from speed_engine.studies.results import AXES, Curves
from speed_engine.studies.study import Study

LABELS = {"images": "images seen", "flops": "training FLOP", "seconds": "seconds of training"}
COLUMNS = 4


def draw(study: Study, cells: list[dict[str, Any]], found: dict[str, Any], out: Path) -> list[Path]:
    """All pictures into the folder `out`; the files written."""
    curves: Curves = {(cell["setting"], cell["method"], cell["seed"]): cell for cell in cells}
    paths = []
    for setting, one in found["settings"].items():
        for axis in AXES:
            path = out / f"{setting}_{axis}.png"
            paths.append(_curves(study, curves, setting, axis, one["target"], path))
        paths.append(_ratios(study, setting, one, out / f"{setting}_ratios.png"))
    paths.append(_profile(found["profile"], out / "profile.png"))
    return paths


def mean_and_spread(curves: list[dict[str, Any]], axis: str) -> tuple[Any, Any, Any]:
    """(where, mean, standard deviation) over seeds at each point, on logs; to where the shortest curve ends.

    A point at which a seed is not finite has neither mean nor spread (NaN).
    """
    length = min(len(curve["values"]) for curve in curves)
    values = np.array([curve["values"][:length] for curve in curves], dtype=float)
    where = np.array([curve[axis][:length] for curve in curves], dtype=float).mean(axis=0)
    logs = np.log(values)
    return where, logs.mean(axis=0), logs.std(axis=0, ddof=1)


def _curves(
    study: Study, curves: Curves, setting: str, axis: str, target: float | None, path: Path
) -> Path:
    """Metric against an axis: thin lines are seeds, the thick one their mean, the band one standard deviation."""
    names = [name for name in study.methods if name != study.reference] or [study.reference]
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    title = (
        f"{study.name}, {setting}: {study.metric} against {LABELS[axis]}\n"
        f"blue: the method, grey: {study.reference}; thin: a seed, thick: mean of logs,\n"
        "band: 1 s.d.; dashed: target; the first fall lies above"
    )
    top = _top([curves[setting, study.reference, seed] for seed in study.seeds])
    size = (3.4 * columns + 0.6, 2.7 * rows + 1.3)
    with _figure(size, title, path) as figure:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for panel in panels.flat[len(names) :]:
            panel.set_visible(False)
        for panel, name in zip(panels.flat, names, strict=False):
            for method, colour in ((study.reference, GREY), (name, BLUE)):
                own = [curves[setting, method, seed]["curve"] for seed in study.seeds]
                _one(panel, own, axis, colour)
            if target is not None:
                panel.axhline(target, color="#c44e22", linewidth=1, linestyle=(0, (4, 3)))
            lost = sum(curves[setting, name, seed]["status"] == "diverged" for seed in study.seeds)
            if lost:
                words = f"{lost} of {len(study.seeds)} diverged"
                panel.text(0.97, 0.9, words, transform=panel.transAxes, ha="right", fontsize=9)
            panel.set_title(name, fontsize=11, color=BLUE, loc="left")
            panel.set_yscale("log")
            _plain(panel.yaxis)
            panel.grid(color=GRID, linewidth=0.6)
            panel.xaxis.set_major_locator(_ticks())
            panel.xaxis.set_major_formatter(_short())
            panel.tick_params(labelsize=9)
        if top is not None:  # what all methods begin with leaves the picture, and one that explodes
            panels[0, 0].set_ylim(top=top)
        figure.supxlabel(LABELS[axis], fontsize=11)
        figure.supylabel(study.metric, fontsize=11)
    return path


def _top(base: list[dict[str, Any]]) -> float | None:
    """The picture's upper edge: half above the baseline's worst value after a quarter of its points.

    What comes before is the fall that all methods share, beside which no difference at the end could be seen.
    """
    late = [cell["curve"]["values"][len(cell["curve"]["values"]) // 4 :] for cell in base]
    known = [value for values in late for value in values if value is not None]
    return 1.5 * max(known) if known else None


def _one(panel: Any, own: list[dict[str, Any]], axis: str, colour: str) -> None:
    for curve in own:
        values = np.array(curve["values"], dtype=float)
        panel.plot(curve[axis], values, color=colour, linewidth=0.7, alpha=0.55)
    if min(len(curve["values"]) for curve in own) == 0:
        return
    where, mean, spread = mean_and_spread(own, axis)
    panel.plot(where, np.exp(mean), color=colour, linewidth=2)
    panel.fill_between(
        where, np.exp(mean - spread), np.exp(mean + spread), color=colour, alpha=0.15, linewidth=0
    )


def _ratios(study: Study, setting: str, found: dict[str, Any], path: Path) -> Path:
    """Ratio to the baseline of what the target costs, with 95 % intervals; an open end is an arrow."""
    names = [name for name in study.methods if name != study.reference]
    rows = [
        (found["methods"][name][axis]["ratio"], place + 0.22 * (number - 1), LINES[number])
        for place, name in enumerate(names)
        for number, axis in enumerate(AXES)
    ]
    known = [r[key] for r, _, _ in rows for key in ("low", "high") if r[key] and r["ratio"]]
    low, high = min([0.5, *known]), max([2.0, *known])
    low, high = max(low, 0.05) / 1.1, min(high, 20.0) * 1.1
    title = f"{study.name}, {setting}: cost of the target, as a ratio to {study.reference}"
    with _figure((9, 0.55 * len(names) + 2.0), title, path) as figure:
        panel = figure.subplots()
        panel.axvline(1, color=GREY, linewidth=1)
        for ratio, place, colour in rows:
            if ratio["ratio"] is None:
                continue
            ends = [max(ratio["low"], low), min(ratio["high"] or math.inf, high)]
            panel.plot(ends, [place, place], color=colour, linewidth=2, solid_capstyle="butt")
            panel.plot(min(max(ratio["ratio"], low), high), place, "o", color=colour, markersize=5)
            for end, sign, open_end in (
                (ends[0], "<", ratio["low"] < low),
                (ends[1], ">", ends[1] == high),
            ):
                if open_end:
                    panel.plot(end, place, sign, color=colour, markersize=5)
        for place, name in enumerate(names):
            one = found["methods"][name]
            if one["images"]["ratio"]["ratio"] is None:
                ratio = one["images"]["ratio"]
                text = f"both reached it in {ratio['arrived']} of {ratio['pairs']} pairs: no bound"
                panel.text(1.02, place, text, fontsize=9, color=GREY, va="center")
        for number, axis in enumerate(AXES):
            panel.plot([], [], "o-", color=LINES[number], label=axis)
        panel.set_xscale("log")
        panel.set_xlim(low, high)
        panel.xaxis.set_major_locator(_ratio_ticks(low, high))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.grid(axis="x", color=GRID, linewidth=0.6)
        panel.set_xlabel(f"below 1: cheaper than {study.reference}; bar: 95 % interval")
        panel.legend(frameon=False, fontsize=9, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return path


def _profile(profile: dict[str, Any], path: Path) -> Path:
    """The share of problems on which a method needs at most r times what the best one does."""
    with _figure((9, 5), "Performance profile over settings x seeds", path) as figure:
        panel = figure.subplots()
        order = sorted(profile["scores"], key=lambda name: -profile["scores"][name])
        dashes = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
        for index, name in enumerate(order):
            panel.step(
                profile["ratios"], profile["shares"][name], where="post", linewidth=1.8,
                color=LINES[index % len(LINES)], linestyle=dashes[index // len(LINES) % 3],
                label=f"{name} ({profile['scores'][name]:.2f})",
            )  # fmt: skip
        panel.set_xlim(1, profile["ratios"][-1])
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("images to the target over the best method's, r")
        panel.set_ylabel("share of settings x seeds solved within r")
        panel.grid(color=GRID, linewidth=0.6)
        panel.legend(
            frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5),
            title="method (area)", title_fontsize=9,
        )  # fmt: skip
    return path


@contextmanager
def _figure(size: tuple[float, float], title: str, path: Path) -> Iterator[Any]:
    """A figure that is saved at the end of the block, without a display or global state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        yield figure
        save(figure, path)


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _short() -> Any:
    """1200 -> 1.2k."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _plain(axis: Any) -> None:
    """A log axis of few decades with numbers as they are said: 0.07, 0.1, 0.2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _ratio_ticks(low: float, high: float) -> Any:
    from matplotlib.ticker import FixedLocator

    named = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
    return FixedLocator([value for value in named if low <= value <= high])
