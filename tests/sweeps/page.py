"""The page of a sweep, made from its JSON alone."""

from __future__ import annotations

from typing import Any

from tests.sweeps.kills import MOMENTS


def failures(told: dict[str, Any]) -> list[str]:
    """Sentences on what a sweep found; none where all held and every control was caught."""
    found = []
    for case, result in told.get("kills", {}).items():
        for number, chain in enumerate(result["chains"]):
            for word, names in (("lost", chain["lost"]), ("differs", chain["apart"])):
                if names:
                    found.append(f"{case}, chain {number}: {word}: {', '.join(names[:3])}")
        if result.get("control") == []:
            found.append(f"{case}: a restore that loses a bit was not noticed")
    for name, counts in told.get("damage", {}).get("files", {}).items():
        if counts["unnoticed"]:
            found.append(f"{name}: {counts['unnoticed']} changes passed unnoticed")
    if told.get("damage", {}).get("control") == 0:
        found.append("without checksums no change of the weights passed: the sweep proves nothing")
    parts = [told.get(part, {}) for part in ("growth", "nodes", "methods")]
    for name, result in [item for part in parts for item in part.items()]:
        found += [f"{name}: {sentence}" for sentence in result["wrong"]]
    return found


HELD = "Nothing was lost, nothing differed, nothing passed unnoticed; every control was caught."
KILLS = """
SIGKILLs that met living trainings, each run started again by the same command, and at its end compared to one that
nobody disturbed: the SHA-256 of every file with tensors in every checkpoint (weights, moments, averages, open sums of
metrics) and every line of metrics but for its times. A moment is drawn over the whole run (any), after a commit of this
start (training), or within 20 ms after the folder of a checkpoint appeared (saving). Of two processes, sometimes one
alone is killed; the other ended by itself. Unfinished: kills that left a checkpoint half-written. Control: a restore
that loses the last bit of one element of AdamW's first moment, and in how many files and lines that shows.
"""
DAMAGE = """
changes of one file each, at random places. Same: the content that was read is the sound one's, as after a change of
white space in JSON.
"""
NODES = """
Two network namespaces joined by a veth pair, one process in each, started on each by its own launcher. Once the run has
saved, a fault; all end, and the same commands go on to the end of the run, which is compared as above. The sweep
itself ends whatever a launcher has left after the time that stands here.
"""

METHODS = """
Methods that learn their table: two processes to step 20, one to 40, two to 60, beside two that train all the way. What
is counted must be the same; `adaptive` must be the same bits where as many processes go on. The weights' distance is in
parts of the way that they have gone since step 20.
"""


def page(told: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Faults",
        "",
        "What `make test-faults` did, made from the JSON file beside this page.",
        "",
    ]
    lines += [f"- {sentence}" for sentence in failures(told)] or [HELD]
    lines += ["", *_table(("condition", "value"), list(told["conditions"].items()))]
    return (
        "\n".join(
            lines + _kills(told) + _damage(told) + _growth(told) + _nodes(told) + _methods(told)
        )
        + "\n"
    )


def _table(head: tuple[str, ...], rows: list[Any]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _kills(told: dict[str, Any]) -> list[str]:
    cases: dict[str, Any] = told.get("kills", {})
    rows, total = [], 0
    for case, result in cases.items():
        each = [kill for chain in result["chains"] for kill in chain["kills"]]
        row = [case, len(each), *(sum(k["moment"] == moment for k in each) for moment in MOMENTS)]
        row += [sum(kill["victims"] == "one" for kill in each)]
        row += [sum(kill["partial"] for kill in each), len(result["chains"])]
        row += [sum(len(chain[key]) for chain in result["chains"]) for key in ("lost", "apart")]
        rows.append([*row, len(result["control"]) if "control" in result else ""])
        total += len(each)
    head = ("engine-processes", "kills", *MOMENTS, "one of two", "unfinished", "ends")
    head = (*head, "lost", "different", "control")
    return (
        ["", "## Kills", "", str(total) + KILLS.replace("\n", " ", 1), *_table(head, rows)]
        if cases
        else []
    )


def _damage(told: dict[str, Any]) -> list[str]:
    files: dict[str, Any] = told.get("damage", {}).get("files", {})
    if not files:
        return []
    total = sum(counts["flips"] + counts["truncations"] for counts in files.values())
    head = ("file", "bit flips", "truncations", "refused", "same", "unnoticed")
    lines = ["", "## Damage", "", str(total) + DAMAGE.replace("\n", " ", 1)]
    lines += _table(head, [[name, *counts.values()] for name, counts in files.items()])
    passed = told["damage"].get("control")
    words = f"Control: with checksums not compared, {passed} changes of the averages passed."
    return lines if passed is None else [*lines, "", words]


def _growth(told: dict[str, Any]) -> list[str]:
    rows = [
        [name, *(each[end][key] for key in ("memory", "files") for end in ("first", "last"))]
        for name, each in told.get("growth", {}).items()
    ]
    head = ("engine", "bytes at step 500", "at the end", "open files at step 500", "at the end")
    return ["", "## Two thousand steps", "", *_table(head, rows)] if rows else []


def _nodes(told: dict[str, Any]) -> list[str]:
    nodes: dict[str, Any] = told.get("nodes", {})
    keys = ("fault", "codes", "seconds", "step")
    rows = [[name, *(each[k] for k in keys), len(each["apart"])] for name, each in nodes.items()]
    head = ("launcher and stage", "fault", "exit codes", "seconds until all ended")
    head = (*head, "went on from step", "different")
    return ["", "## Two nodes", NODES, *_table(head, rows)] if nodes else []


def _methods(told: dict[str, Any]) -> list[str]:
    keys = ("density_apart", "density_largest", "weights_apart")
    rows = [
        [kind, step, *(f"{apart[key]:.2g}" for key in keys)]
        for kind, each in told.get("methods", {}).items()
        for step, apart in each["steps"].items()
    ]
    head = ("method", "step", "density apart by", "of", "weights apart by")
    return ["", "## Methods that learn, elsewhere", METHODS, *_table(head, rows)] if rows else []
