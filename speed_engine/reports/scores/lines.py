"""A report in six lines, and in one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def headline(report: Mapping[str, Any]) -> str:
    """The first numbers of a report, in words."""
    frechet, agreement = report["frechet"], report.get("class_agreement")
    same = frechet.get("same_size")
    value = frechet["distance"] if same is None else same["mean"]
    floor = f" (real data among themselves {frechet['floor']['mean']:.4g})" if same else ""
    told = "" if agreement is None else f", class agreement {agreement['agreement']:.3f}"
    space = report["kind"] if report["kind"] in ("digits", "glyphs") else report["feature_space"]
    return f"Frechet distance {value:.4g}{floor}{told}, features: {space}"


def six(report: Mapping[str, Any]) -> list[str]:
    """What a person reads first; all the rest is in the file."""
    recipe, reference = report.get("recipe") or {}, report["reference"]
    how = ""
    if recipe:
        how = (
            f", {recipe['sampler']} {recipe['steps']} steps, guidance {recipe.get('guidance', 1):g}"
        )
        how = f"{how}, seed {recipe.get('seed', 0)}" if "sampler" in recipe else ""
    num = f"{reference['num']:,} " if reference.get("num") else ""
    space = report["feature_space"]
    return [
        f"samples      {report['num_samples']:,} of {Path(report['samples']).name}{how}",
        f"reference    {num}of {reference['name']}; features: {space}",
        f"Frechet      {_frechet(report['frechet'])}",
        f"kernel       {_kernel(report.get('kernel'))}",
        f"neighbours   {_neighbours(report.get('neighbours'))}",
        f"also         {_also(report)}",
    ]


def _frechet(told: Mapping[str, Any]) -> str:
    if "same_size" not in told:
        return f"{told['distance']:.5g}"
    same, floor = told["same_size"], told["floor"]
    return (
        f"{told['distance']:.4g}; {told['size']:,} of each: {same['mean']:.4g} ± {same['std']:.2g}, real data among "
        f"themselves {floor['mean']:.4g} ± {floor['std']:.2g}"
    )


def _kernel(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return "not told, see the warnings"
    low, high = told["interval"]
    return f"{told['mean']:.4g} [{low:.3g}, {high:.3g}] (middle 95 % of {told['subsets']} subsets of {told['size']:,})"


def _neighbours(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return "not told, see the warnings"
    near, wide = told["k"]
    return (
        f"precision {told['precision']:.3f}, recall {told['recall']:.3f} (k = {near}), density {told['density']:.3f}, "
        f"coverage {told['coverage']:.3f} (k = {wide}), {told['size']:,} of each"
    )


def _also(report: Mapping[str, Any]) -> str:
    parts = []
    if (agreement := report.get("class_agreement")) is not None:
        parts.append(f"class agreement {agreement['agreement']}")
    if (copies := report.get("memorisation")) is not None:
        parts.append(
            f"copies {copies['copies']:.1%}, nearest scan at {copies['ratio']:.2f} of real"
        )
    more = report.get("of_samples") or {}
    if "inception_score" in more:
        score, spread = more["inception_score"], more["inception_score_std"]
        parts.append(f"Inception score {score:.4g} ± {spread:.2g}")
    return "; ".join([*parts, f"all numbers in {report['file']}"])
