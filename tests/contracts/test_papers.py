"""Every row of the papers that can be run: trained for two steps at a shrunken size, judged and sampled from.

Rows that differ by data, size and length alone are one row once they are shrunken; each such group runs once, through
the assembly that `train` and `sample` go through, on twelve pictures in memory.
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from speed_engine.commands.sample import add_arguments
from speed_engine.conditions import label, text
from speed_engine.config import build, merge, parse_overrides
from speed_engine.data import Facts
from speed_engine.data.space import Space
from speed_engine.distributed import Processes
from speed_engine.reports import paper
from speed_engine.sampling.process import Process, Recipe, sample
from speed_engine.training import assembly, validation

# What makes each network small; everything else is the row's own.
DIT = ["model.size=tiny/2", "model.hidden_size=16", "model.depth=2", "model.num_heads=2"]
SMALL = {
    "dit": DIT,
    "dit_text": DIT,
    "mdt": ["model.size=tiny/2", "model.hidden_size=16", "model.depth=3", "model.num_heads=2"],
    "unet": [
        "model.width=8",
        "model.multipliers=[1]",
        "model.num_blocks=1",
        "model.attention_at=[8]",
    ],
}
EVERY = [
    "engine={kind: torch, device: cpu, precision: fp32}",
    "data.expect=null",
    "data.path=pictures",
    "name=row",
    "train.global_batch=4",
    "train.steps=2",
    "validation={every: 100, samples: 4, rows: 2}",
]
RUNS = {name: row for name, row in paper.rows().items() if row.preset}


class Pictures:
    """Twelve pictures of 3 x 8 x 8 pixels and ten classes: a `Source`."""

    facts = Facts((3, 8, 8), Space.pixels(3), {"label": label.described(10)}, flips=True)
    fingerprint = "12"

    def __len__(self) -> int:
        return 12

    def read(self, indices: Any, flips: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        number = torch.as_tensor(indices)
        x = (number[:, None] * 31 + torch.arange(192)).remainder(256).to(torch.uint8)
        return x.view(-1, 3, 8, 8), {"label": number % 10}

    def decode(self, stored: Tensor, normals: Tensor | None = None) -> Tensor:
        return self.facts.space.to_model(stored, normals)


class Captioned(Pictures):
    """The same with two captions each, as vectors of a CLIP of width 6, and their bytes."""

    EMPTY: ClassVar = {"text": np.zeros(6, "f2")}
    TOLD: ClassVar = {"text": text.described("clip", 2, EMPTY, 4)}
    facts = Facts((3, 8, 8), Space.pixels(3), TOLD, flips=True)

    def read(self, indices: Any, flips: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        stored, told = super().read(indices, flips)
        number = told["label"]
        vectors = (number[:, None, None] + torch.arange(12).view(2, 6)).half() / 10
        count, words = torch.full_like(number, 2).int(), torch.zeros(len(number), 4).to(torch.uint8)
        return stored, {"text": vectors, "text_count": count, "text_utf8": words}


def shrunken(name: str) -> dict[str, Any]:
    """The configuration of a row's run, made small."""
    config = RUNS[name].config()
    changes = [*SMALL[config.model.kind], *EVERY]
    if config.schedule.kind == "edm":
        changes.append("schedule.num_cells=512")
    return merge(config.model_dump(mode="json"), parse_overrides(changes))


def grouped() -> dict[str, list[str]]:
    """Rows by what is left of their configuration and sampler once they are shrunken; under the first one's name."""
    found: dict[str, list[str]] = {}
    for name in RUNS:
        key = build(shrunken(name)).model_dump_json() + RUNS[name].sample
        found.setdefault(key, []).append(name)
    return {names[0]: names for names in found.values()}


GROUPS = grouped()


def recipe(name: str) -> Recipe:
    """Of the row's command `sample`, with two steps."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = parser.parse_args(["--out", "drawn", *shlex.split(RUNS[name].sample)])
    return Recipe(sampler=words.sampler, steps=2, guidance=words.guidance, clip_x0=True)


def test_the_groups_hold_every_row() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(RUNS)


@pytest.mark.parametrize("name", GROUPS)
def test_a_row_trains_is_judged_and_is_sampled(name: str) -> None:
    processes = Processes(0, 1, 0, torch.device("cpu"))
    config = build(shrunken(name))
    source = Captioned() if config.model.kind == "dit_text" else Pictures()
    parts = assembly.build(config, processes, source)
    before = {key: value.clone() for key, value in parts.model.state_dict().items()}
    measures = validation.of(parts)
    engine = assembly.open_engine(parts)
    step = assembly.open_step(parts, engine)
    batches = parts.loader.batches(0, 2)
    for number in range(2):
        step(number, batches)
    batches.close()
    after = parts.model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())

    assert measures is not None and 0 < measures.measure(engine)["validation_loss"] < 10

    config, numbers = parts.config, range(2)
    told: dict[str, Tensor] = {}
    for condition in parts.conditions.values():
        told |= condition.default(numbers)
    of = (config.objective, config.learned_variance, parts.facts.shape, parts.conditions)
    process = Process.of(parts.table.schedule, *of)
    network = parts.model.eval()
    x = sample(network, process, recipe(name), conditions_N=told, numbers=numbers)
    assert x.shape == (2, 3, 8, 8) and x.isfinite().all() and not torch.equal(x[0], x[1])
