"""One JSON and one Markdown page of a run.

    python -m benchmarks.report.page --json bench.json --gate gate.json --who NAME

Reads what pytest-benchmark (`--benchmark-json`) and the gate wrote, and writes
`<what>_<device>_<yyyymm>_<who>.{json,md}`. Rows of an op whose gate is red are left out, and named. Paths and host or
user names are removed: the pages are public. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import getpass
import json
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.report.red import needs, red_ops
from benchmarks.report.targets import case_of, verdicts
from benchmarks.report.targets import number as _number

RESULTS = Path(__file__).parents[1] / "results"
SHARED = (
    "gpu",
    "cpu",
    "threads",
    "environment",
    "torch",
    "triton",
    "cuda",
    "driver",
    "python",
    "compiler",
    "commit",
    "dirty",
)
VENDORS = {
    "nvidia",
    "amd",
    "intel",
    "r",
    "tm",
    "cpu",
    "geforce",
    "processor",
    "avx512",
    "avx2",
    "default",
    "no",
    "avx",
}
_PATH = re.compile(r"(?<![\w.<])(?:/[\w.@+-]+){2,}/?|\b[A-Za-z]:\\[^\s'\"]+")


EXPLANATION = """\
Times are wall clock from an idle device to an idle device, the providers of a case alternating round by round in
one process. A ratio is the median over the rounds of rival / ours (quartiles in brackets); above 1, ours is faster.
Floor is the time of the least traffic (every input read once, every output written once) at the bandwidth of a large
copy in the same rounds, over the measured time. GPU time is one call in a CUDA graph with a cold L2 cache, without
the host's share (of a backward pass: both passes less the forward one), and is what single ops are judged by; a ratio
"on GPU" is one of these times. Host time is what a call costs a processor. The kernels' time is theirs alone, with
warm caches.

A training step's floor is its least traffic at the copy's bandwidth after its FLOP (three forward passes, nothing
computed again) at the best rate of a large matrix product in the same run. MFU is the share of the datasheet's peak,
or of that measured rate; an unknown device has no peak. Peak memory counts a provider's own weights and states."""


# ------------------------------------------------------------------ reading


def rows_of(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a pytest-benchmark file: extra_info and the statistics of the rounds, in seconds."""
    rows = []
    for entry in document.get("benchmarks", ()):
        stats = entry["stats"]
        row = {"op": entry.get("group") or entry["name"], "case": "", "provider": entry["name"]}
        row |= entry.get("extra_info", {})
        row |= {f"{name}_s": stats[name] for name in ("median", "q1", "q3", "min")}
        if row.get("kernel_time_s") and {"bytes", "copy_gb_per_s"} <= row.keys():
            floor = row["bytes"] / (1e9 * row["copy_gb_per_s"])
            row["floor_fraction_kernels"] = floor / row["kernel_time_s"]
        rows.append(row | {"rounds": stats["rounds"]})
    return rows


def shared_conditions(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Conditions of the run; where rows disagree (the loader's single thread), the first row's with a remark."""
    found: dict[str, Any] = {}
    for row in rows:
        for key in SHARED:
            if key in row and key not in found:
                found[key] = row[key]
    return found


def scrubbed(value: Any, names: Sequence[str]) -> Any:
    """`value` with absolute paths and the given names replaced in every text."""
    if isinstance(value, str):
        value = _PATH.sub("<path>", value)
        for name in names:
            value = re.sub(rf"\b{re.escape(name)}\b", "<name>", value)
        return value
    if isinstance(value, Mapping):
        return {scrubbed(key, names): scrubbed(each, names) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrubbed(each, names) for each in value]
    return value


def private_names() -> list[str]:
    """This machine's and this user's name; accounts that everybody has are no secret."""
    names = {getpass.getuser(), platform.node(), Path.home().name}
    return sorted(name for name in names if len(name) > 2 and name not in ("root", "localhost"))


def slug(name: str) -> str:
    """A processor's name as part of a file name: `NVIDIA H200` -> `h200`."""
    words = re.findall(r"[a-z0-9]+", name.lower().split("@")[0])
    return "-".join(word for word in words if word not in VENDORS)[:40] or "unknown"


def not_measured(rows: Sequence[Mapping[str, Any]], remarks: Sequence[str]) -> list[str]:
    """Everything that is missing, once, with its reason."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        texts = [f"{name}: {reason}" for name, reason in row.get("not_measured", {}).items()]
        for mode, reason in row.get("compile_failed", {}).items():
            texts.append(f"torch.compile {mode}: {reason}")
        if "gpu_time_missing" in row:
            texts.append(f"GPU time of {row['provider']}: {row['gpu_time_missing']}")
        for text in texts:
            known = cases.setdefault(f"{row['op']}, {text}", [])
            if row["case"] not in known:
                known.append(row["case"])
    return [*remarks, *(f"{text} ({', '.join(names)})" for text, names in cases.items())]


# ------------------------------------------------------------------ writing


def page(result: Mapping[str, Any]) -> str:
    """The Markdown page."""
    rows, gate = result["rows"], result["gate"]
    lines = [f"# {result['what']} on {result['on']}, {result['month']}, {result['who']}", ""]
    if any(row.get("quick") for row in rows):
        lines += [
            "**A quick run: it shows that everything works, and its numbers mean nothing.**",
            "",
        ]
    lines += table(("condition", "value"), result["conditions"].items())
    lines += [EXPLANATION, ""]
    if gate:
        count = sum(each["status"] == "green" for each in gate)
        red = sum(each["status"] == "red" for each in gate) or "none"
        lines += ["## Correctness gate", "", f"{count} of {len(gate)} checks green, {red} red.", ""]
        lines += table(
            ("check", "status", "detail"), ((e["check"], e["status"], e["detail"]) for e in gate)
        )
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        lines += [f"## {op}", "", *ratio_table(mine), *time_table(mine), *category_table(mine)]
        groups = dict.fromkeys(
            f"{row['case']}: {row['alternation']}" for row in mine if "alternation" in row
        )
        if groups:
            text = "Not all providers fitted the memory together; these alternated, and a ratio without quartiles is "
            lines += [f"{text}composed of two ratios to the reference. {'. '.join(groups)}.", ""]
        usual = result["conditions"].get("environment")
        other = [
            f"{case_of(row)}: {row['environment']}"
            for row in mine
            if row.get("environment", usual) != usual
        ]
        if other and usual is not None:
            lines += [f"Under another environment than the page's: {'; '.join(other)}.", ""]
    lines += ["## Targets", ""]
    names = ("what", "case", "must", "goal", "measured", "verdict")
    lines += table(names, ([line[name] for name in names] for line in result["targets"]))
    lines += [
        "## Not measured",
        "",
        *(f"- {text}" for text in result["not_measured"] or ["nothing"]),
        "",
    ]
    return "\n".join(lines)


def ratio_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much faster ours is than every rival, a line a case and a provider of ours."""
    ours = [row for row in rows if row["provider"].split("-")[0] == "ours"]
    keys = dict.fromkeys(
        key for row in ours for key in row if re.fullmatch(r"(gpu_)?ratio_vs_\w+(?<!_q[13])", key)
    )
    if not keys:
        return []
    header = (
        "case",
        *(
            key.replace("ratio_vs_", "").replace("gpu_", "on GPU: ").replace("_", " ")
            for key in keys
        ),
        "floor",
        "rounds",
    )
    body = []
    for row in ours:
        cells = [
            f"**{row[key]:.2f}** [{row[key + '_q1']:.2f}, {row[key + '_q3']:.2f}]"
            if key + "_q1" in row
            else f"{row[key]:.2f}"
            if key in row
            else "-"
            for key in keys
        ]
        body.append((case_of(row), *cells, _percent(row.get("floor_fraction")), row["rounds"]))
    return table(header, body)


def time_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All rows; columns that no row has are left out."""
    columns = {
        "case": lambda row: row["case"],
        "provider": _provider,
        "shape": lambda row: row.get("shape"),
        "dtype": lambda row: row.get("dtype"),
        "median": lambda row: _seconds(row["median_s"]),
        "quartiles": lambda row: f"{_seconds(row['q1_s'])} .. {_seconds(row['q3_s'])}",
        "threads": lambda row: row.get("threads"),
        "samples/s": lambda row: _number(row.get("samples_per_s")),
        "samples/s of CPU": lambda row: _number(row.get("samples_per_cpu_s")),
        "start-up": lambda row: _seconds(row["start_up_s"]) if "start_up_s" in row else None,
        "resume": lambda row: _seconds(row["resume_s"]) if "resume_s" in row else None,
        "bytes a sample": lambda row: _number(row.get("index_bytes_per_sample")),
        "images/s": lambda row: _number(row.get("images_per_s")),
        "TFLOP/s": lambda row: _number(row.get("tflops")),
        "MFU, datasheet": lambda row: _percent(row.get("mfu_datasheet")),
        "MFU, measured": lambda row: _percent(row.get("mfu_measured")),
        "peak memory": lambda row: _gigabytes(row.get("peak_memory_bytes")),
        "floor": lambda row: _percent(row.get("floor_fraction")),
        "copy GB/s": lambda row: _number(row.get("copy_gb_per_s")),
        "GPU time": lambda row: _seconds(row.get("gpu_time_s")),
        "floor on GPU": lambda row: _percent(row.get("floor_fraction_gpu")),
        "host time": lambda row: _seconds(row.get("host_time_s")),
        "kernels' time, warm": lambda row: _seconds(row.get("kernel_time_s")),
        "floor on kernels": lambda row: (
            None
            if "flop" in row or "tflops" in row
            else _percent(row.get("floor_fraction_kernels"))
        ),
        "launches": lambda row: row.get("launches"),
        "copies": lambda row: row.get("device_copies"),
        "host syncs": lambda row: row.get("host_syncs"),
    }
    body = [[make(row) for make in columns.values()] for row in rows]
    used = [i for i in range(len(columns)) if any(line[i] not in (None, "-") for line in body)]
    names = list(columns)
    return table([names[i] for i in used], ([line[i] for i in used] for line in body))


def category_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds of one profiled call by category, and their shares."""
    profiled = [row for row in rows if "ms_by_category" in row]
    if not profiled:
        return []
    names = dict.fromkeys(name for row in profiled for name in row["ms_by_category"])
    body = []
    for row in profiled:
        spent = row["ms_by_category"]
        total = sum(spent.values()) or 1.0
        cells = [
            f"{spent.get(name, 0.0):.1f} ({100 * spent.get(name, 0.0) / total:.0f} %)"
            for name in names
        ]
        body.append((row["case"], _provider(row), *cells))
    text = "Milliseconds of one step by category, from the profiler, which itself costs some:"
    return [text, "", *table(("case", "provider", *names), body)]


def table(header: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table and an empty line."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    for cells in body:
        texts = ("-" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
        lines.append("| " + " | ".join(texts) + " |")
    return [*lines, ""]


def _provider(row: Mapping[str, Any]) -> str:
    """The provider, with the mode, the parts and the options that it ran with."""
    notes = [str(row[key]) for key in ("compile_mode", "overrides") if key in row]
    notes += [f"in parts of {row['micro_batch']}"] if "micro_batch" in row else []
    return row["provider"] + (f" ({', '.join(notes)})" if notes else "")


def _gigabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.1f} GB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def make(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the page says, as JSON values. Raises ValueError where the gate is red or there is no row."""
    documents = [json.loads(path.read_text()) for path in options.json]
    gate = json.loads(options.gate.read_text()) if options.gate else {"gate": [], "conditions": {}}
    red = red_ops(gate)
    measured = [row for document in documents for row in rows_of(document)]
    rows = [row for row in measured if not needs(row) & red.keys()]
    if measured and not rows:
        texts = [text for each in red.values() for text in each]
        raise ValueError(
            f"the correctness gate is red, so no speed is reported: {'; '.join(texts)}"
        )
    remarks = [
        f"{op}: its correctness gate is red: {'; '.join(texts)}" for op, texts in red.items()
    ]
    if not rows:
        raise ValueError("the benchmark files hold no rows; look at the output of pytest")
    conditions = shared_conditions([*rows, gate["conditions"]])
    if options.commit:
        conditions["commit"] = options.commit
    device = "cuda" if "gpu" in conditions else "cpu"
    stamp = datetime.fromisoformat(documents[0]["datetime"])
    return scrubbed(
        {
            "what": ("quick-" if any(row.get("quick") for row in rows) else "") + options.what,
            "who": options.who,
            "month": f"{stamp:%Y%m}",
            "on": conditions["gpu"] if device == "cuda" else conditions.get("cpu", "unknown"),
            "conditions": conditions,
            "gate": gate["gate"],
            "rows": rows,
            "targets": verdicts(rows, device),
            "not_measured": not_measured(rows, [*options.remark, *remarks]),
        },
        private_names(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 and one sentence where there is nothing to report."""
    parser = argparse.ArgumentParser(
        description="one JSON and one Markdown page of a benchmark run"
    )
    parser.add_argument(
        "--json", type=Path, nargs="+", required=True, help="files of pytest --benchmark-json"
    )
    parser.add_argument("--gate", type=Path, help="file of benchmarks.gate.gpu --json")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder (default benchmarks/results)"
    )
    parser.add_argument("--what", default="ops", help="first part of the file name (default ops)")
    parser.add_argument("--who", default="anonymous", help="last part of the file name")
    parser.add_argument("--commit", help="where the code came from, if not from a git checkout")
    parser.add_argument(
        "--remark", action="append", default=[], help="something that was not measured, and why"
    )
    options = parser.parse_args(arguments)
    try:
        result = make(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    names = (slug(result["what"]), slug(result["on"]), result["month"], slug(options.who))
    target = options.out / ("_".join(names) + ".json")
    options.out.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(page(result))
    print(f"{target.name} and {target.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
