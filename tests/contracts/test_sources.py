"""Every kind of data and one outside: each sentence of `speed_engine.data.Source`, and training on it."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speed_engine import kinds
from speed_engine.__main__ import main
from speed_engine.data import DataError, Facts, Source
from speed_engine.data.storage.writer import SetWriter

NUM = 11
# Written from the words of `speed_engine/data/__init__.py` alone.
OUTSIDE = """
import torch
from speed_engine.conditions.label import described
from speed_engine.data import DataError, Facts
from speed_engine.data.space import Space
from speed_engine.kinds import Section

class Config(Section):
    num: int = 11

class Waves:
    def __init__(self, num):
        self.facts = Facts((1, 8, 8), Space("latents", (2.0,), (0.5,)), {"label": described(3)}, flips=True)
        self.fingerprint = f"{num:x}"
        self.num = num
    def __len__(self):
        return self.num
    def read(self, indices, flips=None):
        chosen = torch.as_tensor(indices)
        if len(chosen) == 0:
            chosen = chosen.long()
        whole = chosen.dim() == 1 and chosen.dtype in (torch.int32, torch.int64)
        if not whole or len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.num:
            raise DataError(f"there are {self.num} waves, and {chosen.tolist()} was asked for")
        x = torch.sin(torch.arange(64.0) * (1 + chosen[:, None])).view(-1, 1, 8, 8)
        if flips is not None:
            turned = torch.as_tensor(flips)
            x[turned] = x[turned].flip(-1)
        return x, {"label": chosen % 3}
    def decode(self, stored, normals=None):
        return self.facts.space.to_model(stored, normals)

def build(config):
    return Waves(config.num)
"""
SETS: dict[str, dict[str, Any]] = {
    "pixels": {"dtype": np.uint8},
    "latents": {},
    "posterior": {"posterior": True},
    "flipped": {"flipped": True},
    "unlabelled": {"labelled": False},
    "vector": {"vector": 5},
    "video": {"shape": (2, 3, 4, 4), "vector": 2},
    "audio": {"shape": (2, 16)},
}


def write(
    out: Path,
    dtype: Any = np.float16,
    shape: tuple[int, ...] = (4, 4, 4),
    posterior: bool = False,
    flipped: bool = False,
    labelled: bool = True,
    vector: int = 0,
    seed: int = 0,
) -> None:
    random = np.random.default_rng(seed)
    stored_shape = ((1 + posterior) * shape[0], *shape[1:])

    def draw() -> np.ndarray:
        values = np.abs(random.normal(size=stored_shape)) * (100 if dtype == np.uint8 else 1)
        return values.astype(dtype)

    with SetWriter(out, {"seed": seed}, shard_size=4, posterior=posterior) as writer:
        for number in range(NUM):
            told = {"vector": random.normal(size=vector).astype(np.float32)} if vector else None
            mirrored = draw() if flipped else None
            writer.write(number + 1, draw(), number % 3 if labelled else None, mirrored, told)
        latent = {} if dtype == np.uint8 else {"scale": 1.25, "shift": 0.5}
        writer.finish(**latent)


def open_source(name: str, folder: Path, patch: pytest.MonkeyPatch, seed: int = 0) -> Source:
    if name == "outside":
        (folder / "pack").mkdir(exist_ok=True)
        (folder / "pack" / "waves.py").write_text(OUTSIDE)
        patch.syspath_prepend(folder)
        sys.modules.pop("pack", None)
        config = kinds.config_of("data", {"kind": "pack.waves", "num": NUM + seed})
    elif name == "digits":
        config = kinds.config_of(
            "data", {"kind": "digits", "path": str(folder / "digits"), "held_out": 0.1 * seed}
        )
    elif name == "glyphs":
        place = {"path": str(folder / f"glyphs-{seed}"), "count": 40, "seed": seed}
        config = kinds.config_of("data", {"kind": "glyphs", **place})
    else:
        write(folder / f"{name}-{seed}", **SETS[name], seed=seed)
        config = kinds.config_of(
            "data", {"kind": "shards", "path": str(folder / f"{name}-{seed}"), "check_scale": False}
        )
    return kinds.home(config).build(config)


EVERY = ["digits", "glyphs", "outside", *SETS]


def test_every_kind_is_here() -> None:
    kept = {"digits", "glyphs", "shards"}
    assert set(kinds.names("data")) == kept, "a new kind needs its lines above"


@pytest.mark.parametrize("name", EVERY)
def test_the_contract(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(name, tmp_path, monkeypatch)
    facts = source.facts
    assert (
        isinstance(facts, Facts)
        and Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    )
    assert len(facts.space.scale) == len(facts.space.shift) == facts.shape[0]
    order = [9, 0, 4, 4, 1]
    stored, arrays = source.read(order)
    channels = facts.shape[0] * (1 + facts.space.posterior)
    assert stored.shape == (5, channels, *facts.shape[1:]) and stored.device.type == "cpu"
    x = source.decode(stored)
    assert x.shape == (5, *facts.shape) and x.dtype == torch.float32
    assert torch.equal(x[2], x[3]) and not torch.equal(x[0], x[1])
    names = {key for each in facts.conditions.values() for key in each.arrays}
    assert arrays.keys() == names
    for each in facts.conditions.values():
        assert each.kind in kinds.names("conditions") and not each.null
        for key, array in each.arrays.items():
            assert arrays[key].shape == (5, *array.shape)
            if array.dtype.startswith("int"):
                assert arrays[key].dtype == torch.int64
    for form in (np.array(order), torch.tensor(order), tuple(order)):
        again, told = source.read(form)
        assert torch.equal(again, stored) and all(torch.equal(told[k], arrays[k]) for k in arrays)
    for wrong in ([0, len(source)], [-1]):
        with pytest.raises(DataError, match=rf"(^|\D){wrong[-1]}\D"):
            source.read(wrong)
    for odd in ([0.5], np.array([True, False]), torch.tensor([[1]])):
        with pytest.raises(DataError):
            source.read(odd)  # pyright: ignore[reportArgumentType]
    empty, nothing = source.read([])
    assert len(empty) == 0 and all(len(value) == 0 for value in nothing.values())


@pytest.mark.parametrize("name", EVERY)
def test_flips_and_posterior_are_what_the_facts_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(name, tmp_path, monkeypatch)
    plain, _ = source.read([3, 3])
    if source.facts.flips:
        turned, _ = source.read([3, 3], [True, False])
        assert torch.equal(turned[1], plain[1]) and not torch.equal(turned[0], plain[0])
        if name != "flipped":  # stored latents of mirrored images are not mirrored latents
            assert torch.equal(turned[0], plain[0].flip(-1))
    elif name != "outside":
        with pytest.raises(DataError, match="flip"):
            source.read([3], [True])
    normals = torch.ones(2, *source.facts.shape)
    if source.facts.space.posterior:
        std = plain.float().chunk(2, 1)[1]
        moved = source.decode(plain, normals) - source.decode(plain)
        torch.testing.assert_close(moved, std * 1.25, rtol=1e-3, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="no posterior"):
            source.decode(plain, normals)


@pytest.mark.parametrize("name", EVERY)
def test_the_fingerprint_is_of_the_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = open_source(name, tmp_path, monkeypatch)
    (tmp_path / "again").mkdir()
    same = open_source(name, tmp_path / "again", monkeypatch)
    other = open_source(name, tmp_path, monkeypatch, seed=1)
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", EVERY)
def test_many_threads_read_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(name, tmp_path, monkeypatch)
    wanted, _ = source.read(range(NUM))
    orders = [np.random.default_rng(number).permutation(NUM) for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for order, (stored, _) in zip(orders, pool.map(source.read, orders), strict=True):
            assert torch.equal(stored, wanted[order])


def test_an_outside_source_trains_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_source("outside", tmp_path, monkeypatch)
    words = ["train", "--config", "digits_dit_tiny", "data.kind=pack.waves", "engine=torch"]
    words += ["model.depth=1", "model.hidden_size=16", "model.num_heads=1", "train.steps=2"]
    words += ["train.global_batch=4", "train.flip=true", f"run_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["speed_engine", *words])
    assert main() == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (
        manifest["data"]["fingerprint"] == "b"
        and manifest["config"]["data"]["kind"] == "pack.waves"
    )
    (tmp_path / "pack" / "half.py").write_text(OUTSIDE.replace("self.facts =", "self.fact ="))
    broken = [word.replace("waves", "half") for word in words[:-1]] + [f"run_dir={tmp_path / 'no'}"]
    monkeypatch.setattr(sys, "argv", ["speed_engine", *broken])
    assert main() == 2 and not (tmp_path / "no").exists()
    assert "pack.half" in (said := capsys.readouterr().err) and "no facts" in said
