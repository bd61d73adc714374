"""A trained network and all that sampling must know of it, from a run folder or from a weights file alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_engine import kinds
from speed_engine.conditions import Condition
from speed_engine.config import parse_overrides
from speed_engine.data import Facts
from speed_engine.reports.run_folder import open_run
from speed_engine.sampling.process import Process
from speed_engine.weights import file as weights_file
from speed_engine.weights import source

ASSUMED = {"schedule": "linear", "objective": "epsilon"}  # of weights that do not say: as published


@dataclass(frozen=True)
class Trained:
    """model: on the host, in evaluation mode. source: what names the weights in a folder of samples, JSON-able.

    remarks: what was assumed, one sentence each.
    """

    model: Any
    process: Process
    facts: Facts
    source: dict[str, Any]
    remarks: Sequence[str] = ()


def of_run(folder: Path, weights: str, trusted: Collection[str] = ()) -> Trained:
    """The newest checkpoint of a run; weights: ema or model. Raises CheckpointError."""
    run = open_run(folder, trusted)
    schedule, config = run.table().schedule, run.config
    process = Process.of(
        schedule, config.objective, config.learned_variance, run.facts.shape, run.conditions
    )
    named = {"weights": weights, "step": run.step, "config": config.model_dump(mode="json")}
    return Trained(run.model(weights), process, run.facts, named)


def of_file(
    path: Path,
    overrides: Sequence[str] = (),
    trusted: Collection[str] = (),
    **foreign: Any,
) -> Trained:
    """Weights of any format that `source.read` knows (`foreign`: its arguments).

    What schedule and objective they were trained with stands in our own files; elsewhere it is what `overrides`
    (`schedule.kind=cosine`) say, else that of the published models, and a remark says so. Raises ValueError.
    """
    found = source.read(path, trusted, **foreign)
    model, remarks = found.model, list(found.remarks)
    given = parse_overrides(overrides)
    for section in given:
        if section not in ASSUMED:
            raise ValueError(
                f"sampling from weights has no use for {section}; {' and '.join(ASSUMED)} can be said"
            )
    recorded, settings = found.notes.get("run") or {}, {}
    for section, assumed in ASSUMED.items():
        value = given.get(section) or recorded.get(section)
        if value is None:
            remarks.append(
                f"the weights do not say their {section}; taken as {assumed} ({section}.kind=... says otherwise)"
            )
        settings[section] = kinds.config_of(section, value or assumed, trusted)
    channels = model.facts.shape[0]
    schedule = kinds.home(settings["schedule"]).build(settings["schedule"])
    process = Process.of(
        schedule,
        settings["objective"],
        model.num_outputs == 2 * channels,
        model.facts.shape,
        _conditions(model.facts, trusted),
    )
    named = {
        "weights": path.name,
        "checksum": weights_file.checksum({}, model.state_dict()),
        **{section: each.model_dump(mode="json") for section, each in settings.items()},
    }
    return Trained(model.eval(), process, model.facts, named, remarks)


def _conditions(facts: Facts, trusted: Collection[str]) -> dict[str, Condition]:
    """With the kinds' default settings: how often a condition was dropped is nothing to sampling."""
    made: dict[str, Condition] = {}
    for name, each in facts.conditions.items():
        known = kinds.config_class("conditions", each.kind, trusted).model_fields
        dropout = {"dropout": 0.1 if each.null else 0.0} if "dropout" in known else {}
        config = kinds.config_of("conditions", {"kind": each.kind, **dropout}, trusted)
        made[name] = kinds.find("conditions", each.kind).build(config, name, each)
    return made
