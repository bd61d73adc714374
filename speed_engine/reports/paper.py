"""`python -m speed_engine paper`: every row that the papers report, and the commands that run it here.

`README.md` beside the papers' rows is `paper --markdown`, kept true by a test.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speed_engine.config import ConfigError, RunConfig, load
from speed_engine.config.files import find, read_yaml
from speed_engine.kinds import suggest
from speed_engine.reports import plan
from speed_engine.reports.plan_cost import SHARE_OF_PEAK, Cluster, step_cost
from speed_engine.training.assembly import build_model, macs_per_sample, told
from speed_engine.training.metrics import peak_tflops

PAPERS = Path(__file__).parents[1] / "papers"
FILES = (PAPERS / "speed_2405_17403.yaml", PAPERS / "kim_2411_09998.yaml")
A100 = "NVIDIA A100-SXM4-80GB"
NVLINK = 200.0  # 10^9 bytes/s a process, as `plan` takes it inside a machine


@dataclass(frozen=True)
class Row:
    """One entry of a file. preset: None where nothing is trained, and `why_not` says why. ours: our own number."""

    table: str
    what: str
    reported: str
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    sample: str = "--steps 250"
    ours: str | None = None
    why_not: str | None = None
    known: str | None = None

    def config(self) -> RunConfig:
        """The run, checked. Raises ConfigError."""
        assert self.preset is not None, "nothing is trained"
        return load(self.preset, self.overrides)


def rows() -> dict[str, Row]:
    """All rows by name, in the papers' order."""
    return {
        name: Row(**{**entry, "overrides": tuple(entry.get("overrides", ()))})
        for file in FILES
        for name, entry in read_yaml(file).items()
    }


def listed() -> str:
    """One line a row: name, table, what it is, what was reported, and whether it can be run."""
    lines = []
    for name, row in rows().items():
        ours = f"ours: {row.ours}" if row.preset else f"no run: {row.why_not}"
        lines.append(f"{name:28} {row.table:20} {row.what} | {row.reported} | {ours}")
    return "\n".join(lines)


def shown(name: str) -> str:
    """What the paper says of a row, and the commands. Raises ValueError for a name that there is not."""
    known = rows()
    if name not in known:
        raise ValueError(
            f"no paper has a row {name!r}{suggest(name, list(known))}; `python -m speed_engine paper` lists all "
            f"{len(known)}"
        )
    row = known[name]
    lines = [f"{row.table}: {row.what}", f"reported   {row.reported}"]
    if row.known:
        lines.append(f"beware     {row.known}")
    if row.preset is None:
        return "\n".join([*lines, f"no run     {row.why_not}"])
    return "\n".join(
        [*lines, f"ours       {row.ours}", *_cost(row.config()), "", *_commands(name, row)]
    )


def as_markdown() -> str:
    """Two tables: the rows with what is known against them, and all rows with what they need to be run."""
    known = rows()
    doubtful = {name: row for name, row in known.items() if row.known}
    return "\n".join(
        [
            "# What the papers report, row by row",
            "",
            "The rows of SpeeD (arXiv 2405.17403) and of adaptive sampling (arXiv 2411.09998), written by",
            "`python -m speed_engine paper --markdown`. `paper ROW` tells the commands that run one.",
            "",
            "## What is known against a row",
            "",
            f"{len(doubtful)} of {len(known)} rows; found by comparing the tables with each other, with the formulas",
            "and with the released code.",
            "",
            "| table | what | reported | beware | row |",
            "| --- | --- | --- | --- | --- |",
            *(_cells(r.table, r.what, r.reported, r.known, f"`{n}`") for n, r in doubtful.items()),
            "",
            "## All rows",
            "",
            "| row | table | what | reported | preset and settings | ours |",
            "| --- | --- | --- | --- | --- | --- |",
            *(_cells(f"`{n}`", r.table, r.what, r.reported, *_how(r)) for n, r in known.items()),
        ]
    )


def _how(row: Row) -> tuple[str, str]:
    if row.preset is None:
        return f"no run: {row.why_not}", ""
    return " ".join(f"`{word}`" for word in (row.preset, *row.overrides)), row.ours or ""


def _cells(*texts: str | None) -> str:
    return "| " + " | ".join((text or "").replace("|", "\\|") for text in texts) + " |"


def _cost(config: RunConfig) -> Iterator[str]:
    """Parameters, arithmetic and hours, for the samples that the preset is made for."""
    config, _, facts = told(config, plan.assumed(config))
    parameters = sum(p.numel() for p in build_model(config, facts, "meta").parameters())
    batch, steps = config.train.global_batch, config.train.steps
    macs = macs_per_sample(config, facts, training=True)
    yield f"parameters {parameters / 1e6:.4g} M"
    yield f"training   {steps:,} steps of {batch}: {6.0 * macs * batch * steps:.2e} FLOP"
    peak = peak_tflops(A100)
    assert peak is not None
    where = Cluster(1, 8, SHARE_OF_PEAK * peak, "", NVLINK, NVLINK)
    # Whether weights are kept in bf16 or float32 changes what is sent alone.
    seconds = step_cost(where, macs, parameters, 2, 1, batch / 8).step_s
    yield (
        f"time       predicted, not measured: {steps * seconds / 3600:,.1f} hours on 8 {A100}, at "
        f"{SHARE_OF_PEAK:.0%} of their datasheet's bf16 rate"
    )


def _commands(name: str, row: Row) -> Iterator[str]:
    """Encode, train, sample and score, as they are typed."""
    assert row.preset is not None
    encode = _encode(row.preset)
    config, run, out = row.config(), f"runs/paper/{name}", f"samples/paper/{name}"
    images = shlex.split(encode)[shlex.split(encode).index("--images") + 1]
    latents = "--mode latents" in encode
    vae = " --vae stabilityai/sd-vae-ft-ema" if latents else ""
    num = 50_000 if config.schedule.kind == "edm" else 10_000
    words = shlex.join([f"run_dir={run}", *row.overrides])
    yield encode
    yield f"deepspeed speed_engine/train.py --config {row.preset} {words}"
    yield f"python -m speed_engine sample --run {run} --out {out} --num {num} {row.sample}{vae}"
    # The judge reads folders of pictures alone.
    archive = images.endswith((".tar", ".tar.gz"))
    reference = "FOLDER   # the training pictures, unpacked" if archive else images
    yield f"python -m speed_engine score --samples {out} --reference {reference}"


def _encode(preset: str) -> str:
    """The command that makes a preset's data, from the comment at its head or that of the preset it is based on."""
    while True:
        path = find(preset)
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            if line.startswith("#   python -m speed_engine encode"):
                return line.removeprefix("#").strip()
        base = next((li for li in text.splitlines() if li.startswith("base:")), None)
        if base is None:
            raise ConfigError(f"the preset {preset} does not say how its data are made")
        preset = base.removeprefix("base:").strip()
